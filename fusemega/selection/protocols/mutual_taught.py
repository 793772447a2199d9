"""Mutual-Taught's pairs (arXiv:2506.06292, the E step): length-controlled, from the samples of one model.

Chosen is the shortest response whose reward is above the mean of its prompt's responses, rejected the one of lowest
reward. So a reward model that likes length does not make the policy longer by itself.

Not published, and chosen here: a prompt whose rewards are all equal gives no pair; of equally short responses the one
of higher reward is chosen, then the first; of equally low ones the first is rejected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from fusemega.errors import UserError
from fusemega.selection.protocol import (
    Candidate,
    CandidatePrompt,
    Offer,
    best,
    check_rewards,
    margin,
    register_protocol,
    worst,
)
from fusemega.selection.protocols.one_source import OneSource, OneSourceSettings


def length_controlled_pair(candidates: Sequence[Candidate]) -> tuple[Candidate, Candidate] | None:
    """(chosen, rejected) of the responses to one prompt; None where all rewards are equal, or there is one response.

    With rewards r_1 ... r_M and lengths l_1 ... l_M (arXiv:2506.06292):

        chosen = argmin { l_i : r_i > mean(r) },   rejected = argmin r_i

    Args:
        candidates: all have a finite reward.

    Raises:
        UserError: a reward is absent or not finite.

    >>> long, short, low = Candidate(0, "m", 0.9, None, 40), Candidate(1, "m", 0.8, None, 10), Candidate(2, "m", 0.1)
    >>> length_controlled_pair([long, short, low]) == (short, low)
    True
    """
    rewards = [math.nan if one.reward is None else one.reward for one in candidates]
    if not all(map(math.isfinite, rewards)):
        raise UserError(f"rewards are finite numbers, found {rewards}")
    if len(set(rewards)) < 2:
        return None
    mean = sum(map(Fraction, rewards)) / len(rewards)  # exact: rounded, it may lie on the other side of a reward
    above = [one for one, reward in zip(candidates, rewards, strict=True) if reward > mean]
    shortest = min(one.length for one in above)
    return best([one for one in above if one.length == shortest]), worst(candidates)


class MutualTaughtSelectionSettings(OneSourceSettings):
    """The `protocol` section of `mutual_taught`."""

    name: Literal["mutual_taught"] = "mutual_taught"


@register_protocol("mutual_taught")
class MutualTaughtSelection(OneSource):
    """Length-controlled pairs: the shortest response of more than the mean reward against that of the lowest."""

    Settings = MutualTaughtSelectionSettings
    settings: MutualTaughtSelectionSettings

    def offer(self, prompt: CandidatePrompt) -> Offer:
        check_rewards(prompt)
        own = self.own(prompt)
        if len(own) < 2:
            return Offer(why="fewer than two responses", kinds=("preference",))
        pair = length_controlled_pair(own)
        if pair is None:
            return Offer(why="all rewards are equal", kinds=("preference",), margins=(0.0,))
        return Offer(preference=pair, kinds=("preference",), margins=(margin(best(own), worst(own)),))
