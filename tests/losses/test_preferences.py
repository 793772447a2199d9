"""Losses over responses against plain loops: values, gradients, each setting, metrics, and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fusemega.errors import UserError
from fusemega.losses.orpo import log_odds
from fusemega.losses.registry import parse_objective
from tests.logits.loops import make_head
from tests.losses.preferences import (
    CASES,
    IN_JOB,
    PAIRS,
    ROWS,
    SCORED,
    TRIPLES,
    VOCAB,
    PreferenceCase,
    batch_of,
    built,
    pair,
    samples_of,
    softmax,
)


@pytest.mark.parametrize("name", CASES)
def test_equal_the_plain_form(name: str) -> None:
    assert PreferenceCase(*CASES[name]).check() < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_comparisons_do_not_depend_on_what_is_not_compared(name: str) -> None:
    """Such responses are left out of the batch."""
    section, groups = CASES[name]
    samples = samples_of(groups)
    objective = built(section, samples)
    for group in samples:
        members, fields = objective.comparisons(group)
        kept = np.unique(members)
        again, same = objective.comparisons([group[place] for place in kept])
        assert (kept[again] == members).all() and {key: list(values) for key, values in same.items()} == {
            key: pytest.approx(list(values)) for key, values in fields.items()
        }


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("dpo, sigmoid", {"beta": 0.7}),
    ("dpo, sigmoid", {"loss_type": "sigmoid_norm"}),
    ("dpo, sigmoid", {"loss_type": "hinge"}),
    ("dpo, ipo", {"loss_type": "ipo_sum"}),
    ("dpo, sigmoid", {"label_smoothing": 0.2}),
    ("dpo, sigmoid", {"ld_alpha": 0.5}),
    ("dpo, hinge", {"rpo_alpha": 0.5}),
    ("simpo", {"beta": 1.0}),
    ("simpo", {"gamma_beta_ratio": 0.1}),
    ("orpo", {"beta": 0.6}),
    ("rloo", {"beta": 0.4}),
    ("rloo", {"beta": 0.0, "reference": None}),
    ("wrpo", {"loss_type": "ipo"}),
    ("wrpo", {"beta": 0.7}),
    ("wrpo", {"alpha": 0.2}),
    ("wrpo", {"schedule": "constant"}),
    ("wrpo", {"label_smoothing": 0.2}),
    ("wrpo", {"target": "source a"}),
    ("wrpo, simpo", {"gamma_beta_ratio": 0.1}),
    ("fuse_sft", {"alpha": 0.1}),
    ("fuse_sft", {"top_k_responses": 2}),
    ("fuse_po", {"alpha": 0.1}),
    ("fuse_po", {"beta": 0.7}),
    ("fuse_po", {"loss_type": "rloo"}),
    ("fuse_po, simpo", {"gamma_beta_ratio": 0.1}),
]


@pytest.mark.parametrize(("name", "change"), SETTINGS, ids=str)
def test_every_setting_changes_loss_and_gradient(name: str, change: dict[str, Any]) -> None:
    """And the plain form with it, to which each is equal."""
    section, groups = CASES[name]
    found = []
    if change == {"target": "source a"}:
        groups = groups[:1]
    for each in (section, section | change):
        case = PreferenceCase(each, groups)
        assert case.check() < 1e-12
        hidden, weight = make_head(tokens=len(case.batch.labels), rows=ROWS)
        loss, _ = case.loss(hidden, weight)
        found.append((loss.item(), *torch.autograd.grad(loss, hidden)))
    assert abs(found[0][0] - found[1][0]) > 1e-5 and (found[0][1] - found[1][1]).abs().max() > 1e-5


def test_wrpo_moves_from_the_target_to_the_sources() -> None:
    section, groups = CASES["wrpo"]
    for done in (0.0, 0.25, 0.99):
        case = PreferenceCase(section, groups, done)
        assert case.check() < 1e-12 and case.objective.measured(case.batch)["alpha"] == (
            pytest.approx(0.6 * done * 2),
            2,
        )
    assert PreferenceCase(section | {"schedule": "constant"}, groups, 0.0).objective.alpha == 0.6  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["dpo, all options", "wrpo", "rloo", "fuse_po"])
def test_parts_add_up_to_the_whole(name: str) -> None:
    """Groups in several micro-batches, of several data-parallel ranks, some without a group."""
    case = PreferenceCase(*CASES[name])
    hidden, weight = make_head(tokens=len(case.batch.labels), rows=ROWS)
    whole, sums = case.loss(hidden, weight)
    logp_N = (hidden @ weight[:VOCAB].t()).log_softmax(1).gather(1, case.batch.labels[:, None])[:, 0]
    found, start = torch.zeros((), dtype=torch.float64), 0
    counted, told = 0, dict.fromkeys(sums, 0.0)
    for group in [*([group] for group in case.samples), []]:
        batch = batch_of(case.objective, group, case.samples[0])
        part = slice(start, start + len(batch.labels))
        start = part.stop
        batch = case.with_reference(batch, case.reference_N[part])
        weights = torch.ones(len(batch.labels)) if batch.token_weights is None else batch.token_weights
        values = logp_N[part].view(-1, *[1] * (weights.dim() - 1)) * weights
        logp_S = values.new_zeros(len(batch.sequence_tokens), *values.shape[1:]).index_add(0, batch.sequences, values)
        loss, mine = case.objective.loss(logp_S, batch, case.denominators)
        found = found + loss
        counted += case.objective.counts(batch)[case.section["name"]]
        told = {key: value + mine[key].item() for key, value in told.items()}
    assert counted == len(case.groups) == case.objective.counts(case.batch)[case.section["name"]]
    torch.testing.assert_close(found, whole)
    assert told == pytest.approx({key: value.item() for key, value in sums.items()})
    torch.testing.assert_close(torch.autograd.grad(found, hidden), torch.autograd.grad(whole, hidden))


def test_metrics_of_pairs() -> None:
    case = PreferenceCase(*CASES["dpo, all options"])
    hidden, weight = make_head(tokens=len(case.batch.labels), rows=ROWS)
    _, sums = case.loss(hidden, weight)
    assert {"dpo", *case.objective.statistics} == sums.keys()
    wanted = dict.fromkeys(case.objective.statistics, 0.0)
    for group in case.responses(hidden, weight[:VOCAB]):
        both = pair(group)
        shared = min(each.tokens for each in both)
        rewards = [0.5 * each.h(True, shared, 0.3).item() for each in both]
        for name, one, reward in zip(("chosen", "rejected"), both, rewards, strict=True):
            wanted[f"rewards/{name}"] += reward
            wanted[f"logps/{name}"] += (one.mean * one.tokens).item()
            wanted["kl"] += one.kl.item() / 2
        wanted["rewards/accuracies"] += rewards[0] > rewards[1]
        wanted["rewards/margins"] += rewards[0] - rewards[1]
        wanted["nll_loss"] -= both[0].mean.item()
    assert {name: sums[name].item() for name in wanted} == pytest.approx(wanted)
    assert case.objective.measured(case.batch) == {"lengths/chosen": (8, 3), "lengths/rejected": (6, 3)}


def test_metrics_of_triples_and_of_sources() -> None:
    case = PreferenceCase(*CASES["wrpo"])
    hidden, weight = make_head(tokens=len(case.batch.labels), rows=ROWS)
    _, sums = case.loss(hidden, weight)
    first, second = case.responses(hidden, weight[:VOCAB])
    triples = [(first[4], first[0], first[3]), (second[4], second[1], second[3])]
    source, target, rejected = (sum(0.5 * triple[i].h().item() for triple in triples) for i in range(3))
    assert sums["rewards/chosen_source"].item() == pytest.approx(source)
    assert sums["rewards/chosen_target"].item() == pytest.approx(target)
    assert sums["rewards/chosen"].item() == pytest.approx(0.3 * source + 0.7 * target)
    assert sums["rewards/margins"].item() == pytest.approx(0.3 * source + 0.7 * target - rejected)
    case = PreferenceCase(*CASES["fuse_po"])
    # Source b of the first prompt has one response, and the target no part in either weight of the other.
    weights = [softmax([0.3, 0.5], 0.3), softmax([0.3, 0.4], 0.3)]
    measured = case.objective.measured(case.batch)
    assert measured["weights/target"] == pytest.approx((weights[0][0] + weights[1][1], 2))
    assert measured["weights/source a"] == pytest.approx((weights[0][1], 2))
    assert measured["weights/source b"] == pytest.approx((weights[1][0], 2))


def test_automatic_alpha() -> None:
    """The mean over the prompts of the standard deviation of what is weighted."""
    for name, rewards in (("fuse_sft", ([0.3, 0.5, 0.6], [0.3, 0.4])), ("fuse_po", ([0.3, 0.5], [0.3, 0.4]))):
        section, groups = CASES[name]
        alpha = float(np.mean([np.std(each) for each in rewards]))
        found, wanted = (
            PreferenceCase(section | {"alpha": each}, groups).batch.comparison_fields["weight"]
            for each in ("auto", alpha)
        )
        torch.testing.assert_close(found, wanted)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"name": "dpo", "beta": 0, "reference": IN_JOB}, r"objective\.beta: .* greater than 0"),
    ({"name": "simpo", "beta": -1}, r"objective\.beta: .* greater than 0"),
    ({"name": "dpo", "loss_type": "sigmoid_nrom", "reference": IN_JOB}, "did you mean 'sigmoid_norm'"),
    ({"name": "dpo"}, r"objective\.reference: required"),
    ({"name": "dpo", "loss_type": "hinge", "label_smoothing": 0.1, "reference": IN_JOB},
     r"objective\.label_smoothing: no effect with loss_type hinge; allowed: leave it out, or loss_type sigmoid"),
    ({"name": "dpo", "ld_alpha": 1.5, "reference": IN_JOB}, r"objective\.ld_alpha: .* less than or equal to 1"),
    ({"name": "dpo", "ld_alpha": 0.5, "reference": {"store": "s"}}, r"objective\.reference: a store has whole sums"),
    ({"name": "rloo"}, r"objective\.reference: needed for the KL divergence"),
    ({"name": "rloo", "beta": 0, "reference": IN_JOB}, r"objective\.reference: no effect with beta 0"),
    ({"name": "wrpo", "alpha": 1.1, "reference": IN_JOB}, r"objective\.alpha: .* less than or equal to 1"),
    ({"name": "wrpo"}, r"objective\.reference: needed with loss_type sigmoid"),
    ({"name": "wrpo", "loss_type": "simpo", "gamma_beta_ratio": 0.3, "reference": IN_JOB},
     "no effect with loss_type simpo"),
    ({"name": "wrpo", "loss_type": "simpo"}, r"objective\.gamma_beta_ratio: needed with loss_type simpo"),
    ({"name": "wrpo", "gamma_beta_ratio": 0.0, "reference": IN_JOB}, "no effect with loss_type sigmoid"),
    ({"name": "wrpo", "loss_type": "ipo", "label_smoothing": 0.1, "reference": IN_JOB}, "no effect with loss_type ipo"),
    ({"name": "fuse_sft", "alpha": 0}, r"objective\.alpha: has to be greater than 0, or auto"),
    ({"name": "fuse_sft", "alpha": "atuo"}, r"objective\.alpha: found 'atuo' \(did you mean 'auto'\?\)"),
    ({"name": "fuse_po", "beta": 1, "loss_type": "simpo", "reference": IN_JOB, "gamma_beta_ratio": 0.3},
     "no effect with loss_type simpo"),
    ({"name": "fuse_po", "beta": 1, "loss_type": "dpo"}, r"objective\.reference: needed with loss_type dpo"),
]  # fmt: skip


@pytest.mark.parametrize(("section", "message"), REFUSED, ids=str)
def test_settings_without_effect_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_objective(section)


BAD_ROWS: list[tuple[str, Any, str]] = [
    ("rloo", [[(1, {"reward": 1}), (2, {})]], r"rows.jsonl:1: response 2 of 2 has no reward"),
    ("dpo, sigmoid", [[(1, {"reward": 1}), (2, {"reward": 1})]], "rows.jsonl:1: objective.name dpo needs two"),
    ("rloo", [PAIRS[2], [(1, {"reward": 1}), (2, {"reward": 1})]], "rows.jsonl:2: objective.name rloo needs two"),
    ("fuse_sft", [[(1, {"reward": 1}), (2, {"reward": 0})]], "response 1 of 2 names no source"),
    ("fuse_po", [SCORED[0][:2]], "rows.jsonl:1: objective.name fuse_po needs two responses of one source"),
    ("wrpo", [SCORED[0][:2]], "needs a source's response and two of the target"),
    ("wrpo, in order", [TRIPLES[0][:2]], "groups of three responses .* found 2"),
    ("simpo", [[(1, {"chosen": 1, "weight": 1}), (2, {"chosen": 0, "weight": 2})]], "the weights 1, 2; allowed: one"),
    ("simpo", [[(1, {"chosen": 1, "weight": -1}), (2, {"chosen": 0, "weight": -1})]], "its weight is -1; allowed: 0"),
    ("simpo", [[(1, {"chosen": 1, "weight": 0}), (2, {"chosen": 0, "weight": 0})]], "in a row whose weight is not 0"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "groups", "message"), BAD_ROWS, ids=str)
def test_rows_that_cannot_be_compared_are_refused(name: str, groups: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        built(CASES[name][0], samples_of(groups))


def test_rows_that_cannot_be_compared_are_skipped_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    groups = samples_of([*SCORED, [(1, {"reward": 1, "source": 0, "margin": 1}), (2, {"reward": 1, "source": 0})]])
    objective = built(CASES["rloo"][0], groups, on_bad_row="skip")
    told = capsys.readouterr().err
    assert "1 of 3 rows give no loss: each lacks two responses with different rewards" in told
    assert "1 rows have a margin, which objective.name rloo does not read" in told
    assert objective.counts(batch_of(objective, groups, groups[0])) == {"rloo": 2}
    assert objective.counts(batch_of(objective, groups[2:], groups[2])) == {"rloo": 0}


def test_unknown_target() -> None:
    with pytest.raises(UserError, match=r"rows.jsonl: no response has the source 'tarjet' .* \(did you mean 'target'"):
        built(CASES["wrpo"][0] | {"target": "tarjet"}, samples_of(SCORED))


def test_log_odds_at_both_ends() -> None:
    logp = torch.tensor([-1e-18, -1e-9, -0.5, -40.0, -800.0], dtype=torch.float64, requires_grad=True)
    found = log_odds(logp)
    wanted = [36.04, 20.723265836, 0.43275213, -40.0, -800.0]
    assert found.tolist() == pytest.approx(wanted, rel=1e-3)
    (gradient,) = torch.autograd.grad(found.sum(), logp)
    assert gradient.isfinite().all() and gradient[2].item() == pytest.approx(1 / (1 - np.exp(-0.5)))
