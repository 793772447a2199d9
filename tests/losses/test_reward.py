"""The reward model's loss against plain loops in float64, each setting, and what it refuses."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fusemega.errors import UserError
from fusemega.losses.registry import build_objective, parse_objective
from fusemega.passes.micro_batch import FieldShapes, collate
from fusemega.text.sample import Sample

MARGINS = (0.0, 0.5, 2.0)
SCORES = [0.3, -0.2, -1.5, 0.4, 1.0, 2.0]
CASES: list[tuple[dict[str, Any], tuple[float, ...], float]] = [
    ({}, (0.0, 0.0, 0.0), 0.0),
    ({"margin": 0.7}, (0.7, 0.7, 0.7), 0.0),
    ({"margin": "rows"}, MARGINS, 0.0),
    ({"center_rewards_coefficient": 0.1}, (0.0, 0.0, 0.0), 0.1),
    ({"margin": "rows", "center_rewards_coefficient": 0.25}, MARGINS, 0.25),
]


def pair(number: int, **scalars: float) -> list[Sample]:
    samples = []
    for chosen in (1.0, 0.0):
        ids = np.arange(4 + number, dtype=np.int32)
        samples.append(
            Sample(
                bytes(16),
                ids,
                ids > 1,
                ids,
                3,
                f"pairs.jsonl:{number}",
                group=number,
                scalars={"chosen": chosen} | scalars,
            )
        )
    return samples


def built(settings: dict[str, Any]) -> Any:
    nothing: Any = None
    return build_objective(parse_objective({"name": "reward", **settings}), nothing, 10)


@pytest.mark.parametrize(("settings", "margins", "coefficient"), CASES, ids=str)
def test_loss_and_gradient_of_every_setting(
    settings: dict[str, Any], margins: tuple[float, ...], coefficient: float
) -> None:
    objective = built(settings)
    given = settings.get("margin") == "rows"
    pairs = [
        pair(n, **({"margin": m} if given else {}), **({"weight": 2.0} if n else {})) for n, m in enumerate(margins)
    ]
    pairs[1].reverse()  # a row's order does not say which is chosen
    batch = collate(pairs, objective, 64, 0, FieldShapes.of(objective, pairs[0]))
    assert objective.counts(batch) == dict.fromkeys(objective.terms, 3)
    scores = torch.tensor(SCORES, dtype=torch.float64, requires_grad=True)
    loss, sums = objective.loss(scores, batch, dict.fromkeys(objective.terms, 5.0))  # other ranks have two pairs more
    loss.backward()
    wanted, slopes, differences = 0.0, [], []
    for b, margin in enumerate(margins):
        chosen, rejected = SCORES[2 * b : 2 * b + 2] if b != 1 else SCORES[3:1:-1]
        differences.append(chosen - rejected)
        weight = 2.0 if b else 1.0
        lost = 1 / (1 + math.exp(chosen - rejected - margin))  # probability that the rejected one is preferred
        wanted += weight * (-math.log(1 - lost) + coefficient * (chosen + rejected) ** 2)
        centring = 2 * coefficient * (chosen + rejected)
        both = [weight * (-lost + centring), weight * (lost + centring)]
        slopes += both if b != 1 else both[::-1]
    assert float(loss.detach()) == pytest.approx(wanted / 5, rel=1e-12)
    assert scores.grad is not None
    assert scores.grad.tolist() == pytest.approx([slope / 5 for slope in slopes], rel=1e-12)
    assert set(sums) == {*objective.terms, *objective.statistics}
    assert float(sums["margin"]) == pytest.approx(sum(differences), rel=1e-12)
    assert int(sums["accuracy"]) == sum(difference > 0 for difference in differences) == 2
    assert float(sums["mean_reward"]) == pytest.approx(sum(SCORES) / 2, rel=1e-12)
    if coefficient:
        assert float(sums["reward"] + coefficient * sums["center"]) == pytest.approx(wanted, rel=1e-12)
    none = collate([], objective, 8, 0, FieldShapes.of(objective, pairs[0]))
    assert float(objective.loss(scores[:0], none, dict.fromkeys(objective.terms, 1.0))[0]) == 0.0


def test_a_score_is_read_before_what_the_model_takes_for_padding() -> None:
    objective = built({})
    (first, second), nothing = pair(1), pair(1)
    ids = np.array([5, 7, 3, 7, 7], dtype=np.int32)
    ended = Sample(bytes(16), ids, ids == 3, ids, 3, "x:1", group=1, scalars={"chosen": 1.0})
    padding = Sample(bytes(16), ids[3:], ids[3:] == 3, ids[3:], 3, "x:1", group=1, scalars={"chosen": 0.0})
    like = FieldShapes.of(objective, nothing)
    found = collate([[first, second], [ended, padding]], objective, 32, 0, like, multiple=4, unscored_id=7)
    assert found.last_tokens.tolist() == [4, 12, 18, 24]
    assert collate([[first, second]], objective, 32, 0, like, unscored_id=4).last_tokens.tolist() == [3, 8]


class Rows(list[Sample]):
    """A data set of one group."""

    num_units = 1
    sources = ()
    config = SimpleNamespace(on_bad_row="error")

    def unit(self, i: int) -> range:
        return range(len(self))


@pytest.mark.parametrize(
    ("settings", "scalars", "words"),
    [
        ({}, {"chosen": 1.0, "margin": 0.5}, ["pairs.jsonl:3", "has a margin", "allowed: rows, or a number"]),
        ({"margin": "rows"}, {"chosen": 1.0}, ["pairs.jsonl:3", "has no margin"]),
        ({}, {}, ["pairs.jsonl:3", "has no reward"]),
        ({}, {"reward": 1.0}, ["pairs.jsonl:3", "reward needs two responses with different rewards"]),
        ({}, {"chosen": 1.0, "weight": -1.0}, ["pairs.jsonl:3", "weight is -1.0"]),
    ],
)
def test_rows_that_it_does_not_take(settings: dict[str, Any], scalars: dict[str, float], words: list[str]) -> None:
    both = [
        Sample(**{**vars(sample), "scalars": scalars | sample.scalars if "chosen" in scalars else scalars})
        for sample in pair(3)
    ]
    rows: Any = Rows(both)
    with pytest.raises(UserError) as error:
        built(settings).check_data(rows)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    "settings", [{"center_rewards_coefficient": -0.1}, {"margin": "row"}, {"margins": 1.0}], ids=str
)
def test_settings_that_it_does_not_take(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="objective.(center_rewards_coefficient|margin)"):
        built(settings)


def test_of_scored_responses_the_best_and_the_worst_are_the_pair() -> None:
    samples = [Sample(**{**vars(pair(3)[0]), "scalars": {"reward": reward}}) for reward in (0.5, 2.0, -1.0)]
    members, fields = built({"margin": 0.3}).comparisons(samples)
    assert members.tolist() == [[1, 2]] and fields["margin"].tolist() == [0.3] and fields["weight"].tolist() == [1.0]
