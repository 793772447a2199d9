"""Which responses to a prompt a loss compares, by their rewards and sources; decided when a batch is built.

All of it is known from the data, so it is done on the host and the device only looks sequences up. Ties go to the
response that comes first in the row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fusemega.errors import UserError
from fusemega.text.sample import Sample


@dataclass(frozen=True)
class ResponseComparison:
    """One term of a loss.

    Attributes:
        places: its responses, as places in the group.
        share: its part of the group; those of a group sum to 1.
        numbers: others that the loss reads, by name.
    """

    places: tuple[int, ...]
    share: float = 1.0
    numbers: Mapping[str, float] = field(default_factory=dict)


def rewards_of(samples: Sequence[Sample]) -> np.ndarray:
    """float64: the reward of each response.

    Raises:
        UserError: one has none.
    """
    if missing := [place for place, sample in enumerate(samples) if "reward" not in sample.scalars]:
        raise UserError(
            f"{samples[0].source}: response {missing[0] + 1} of {len(samples)} has no reward, by which this objective "
            "ranks responses; allowed: a finite number for each"
        )
    return np.array([sample.scalars["reward"] for sample in samples])


def best_and_worst(rewards: np.ndarray, places: Sequence[int]) -> tuple[int, int] | None:
    """The responses of highest and of lowest reward among `places`; None if all rewards are equal.

    >>> best_and_worst(np.array([0.5, 2.0, -1.0, 2.0]), [0, 1, 3])
    (1, 0)
    """
    best, worst = max(places, key=lambda i: rewards[i]), min(places, key=lambda i: rewards[i])
    return None if rewards[best] == rewards[worst] else (best, worst)


def pair_of(samples: Sequence[Sample]) -> list[ResponseComparison]:
    """The chosen and the rejected response of a pair; of scored responses, the best and the worst.

    Raises:
        UserError: scored responses of which one has no reward.
    """
    if "chosen" in samples[0].scalars:
        chosen = [bool(sample.scalars["chosen"]) for sample in samples]
        return [ResponseComparison((chosen.index(True), chosen.index(False)))]
    found = best_and_worst(rewards_of(samples), range(len(samples)))
    return [] if found is None else [ResponseComparison(found)]


def by_source(samples: Sequence[Sample]) -> dict[int, list[int]]:
    """The number of each source, rising -> its responses, in the order of the row.

    Raises:
        UserError: a response has no source.
    """
    found: dict[int, list[int]] = {}
    for place, sample in enumerate(samples):
        source = int(sample.scalars.get("source", -1))
        if source < 0:
            raise UserError(
                f"{sample.source}: response {place + 1} of {len(samples)} names no source, and this objective treats "
                "each source by itself; allowed: responses as objects with text (or messages), source and reward"
            )
        found.setdefault(source, []).append(place)
    return dict(sorted(found.items()))


def best_of_each(samples: Sequence[Sample]) -> list[int]:
    """The response of highest reward of each source. Raises as `by_source` and `rewards_of`."""
    rewards = rewards_of(samples)
    return [max(places, key=lambda i: rewards[i]) for places in by_source(samples).values()]


def softmax_weights(rewards: np.ndarray, alpha: float) -> np.ndarray:
    """softmax(rewards / alpha): weights that sum to 1 (FuseRL).

    >>> softmax_weights(np.array([1.0, 1.0, 0.0]), 0.01).round(3).tolist()
    [0.5, 0.5, 0.0]
    """
    weights: np.ndarray = np.exp((rewards - rewards.max()) / alpha)
    return weights / weights.sum()


def leave_one_out(rewards: np.ndarray) -> np.ndarray:
    """Each reward minus the mean of the others (RLOO).

    >>> leave_one_out(np.array([3.0, 1.0, 2.0])).tolist()
    [1.5, -1.5, 0.0]
    """
    count = len(rewards)
    return (rewards - rewards.mean()) * (count / (count - 1))


def advantages(rewards: np.ndarray, places: Sequence[int], share: float = 1.0) -> list[ResponseComparison]:
    """Each of the responses `places` with its `advantage`, and beside it the best and the worst of them, for metrics.

    They share `share` equally. None, if there are no two different rewards.
    """
    found = best_and_worst(rewards, places)
    if found is None:
        return []
    numbers = leave_one_out(rewards[list(places)])
    return [
        ResponseComparison((place, *found), share / len(places), {"advantage": float(number)})
        for place, number in zip(places, numbers, strict=True)
    ]


def weight_of(samples: Sequence[Sample]) -> float:
    """The weight of a row, which all of its responses have; 1 if it names none.

    Raises:
        UserError: the responses have several weights, or a negative one.
    """
    weights = {sample.scalars.get("weight", 1.0) for sample in samples}
    if len(weights) > 1:
        raise UserError(
            f"{samples[0].source}: its responses have the weights {', '.join(map(str, sorted(weights)))}; allowed: one "
            "weight for the row, which multiplies its part of the loss"
        )
    (weight,) = weights
    if not weight >= 0:
        raise UserError(f"{samples[0].source}: its weight is {weight}; allowed: 0 or more")
    return weight
