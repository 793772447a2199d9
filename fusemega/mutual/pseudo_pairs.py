"""Pairs of a new policy's response and that of the policy before, and which are believed (arXiv:2506.06292, M step).

For each prompt x of the reward model's portion, y_t ~ pi_t is taken to be better than y_{t-1} ~ pi_{t-1}. With the
reward model that is there,

    dr = r_{t-1}(x, y_t) - r_{t-1}(x, y_{t-1})
    eps_t = standard deviation of r_{t-1}(x, y_{t-1}) over the prompts

and a pair is dropped where dr <= -eps_t. Pairs of mildly negative dr stay: they tell the reward model something new.

Not published, and chosen here: the standard deviation is the population's (divided by n).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from fusemega.errors import UserError


@dataclass(frozen=True)
class PseudoPairs:
    """All pairs of one M step.

    Attributes:
        differences: key of the prompt -> dr.
        epsilon: eps_t.
    """

    differences: Mapping[str, float]
    epsilon: float

    @property
    def kept(self) -> list[str]:
        """Keys of the pairs that are believed, in the given order."""
        return [key for key, difference in self.differences.items() if is_believed(difference, self.epsilon)]


def is_believed(difference: float, epsilon: float) -> bool:
    """Whether a pair stays: dr > -eps.

    >>> [is_believed(difference, 0.5) for difference in (-0.5, -0.4, 0.0, 2.0)]
    [False, True, True, True]
    """
    return difference > -epsilon


def pseudo_pairs(new: Mapping[str, float], old: Mapping[str, float]) -> PseudoPairs:
    """The pairs with their differences, and eps_t.

    Args:
        new: key of the prompt -> r_{t-1} of the new policy's response.
        old: the same of the policy before. Only prompts of both are pairs; eps_t is over these.

    Raises:
        UserError: a reward that is not finite, or no prompt of both.

    >>> found = pseudo_pairs({"a": 1.0, "b": -1.0, "c": 2.0}, {"a": 1.5, "b": 0.5, "c": 1.0})
    >>> found.differences, round(found.epsilon, 4), found.kept
    ({'a': -0.5, 'b': -1.5, 'c': 1.0}, 0.4082, ['c'])
    """
    both = [key for key in new if key in old]
    if not both:
        raise UserError("no prompt has a response of both policies")
    for key in both:
        if not (math.isfinite(new[key]) and math.isfinite(old[key])):
            raise UserError(f"a reward is a finite number, found {new[key]} and {old[key]}")
    # Exact: equal rewards have the deviation 0, whatever their mean is rounded to.
    epsilon = statistics.pstdev(old[key] for key in both)
    return PseudoPairs({key: new[key] - old[key] for key in both}, epsilon)


def kept_share(differences: Mapping[str, float], epsilon: float) -> float:
    """The share of pairs that another eps would keep.

    >>> kept_share({"a": -0.5, "b": -1.5, "c": 1.0}, 1.0)
    0.6666666666666666
    """
    return sum(is_believed(difference, epsilon) for difference in differences.values()) / len(differences)
