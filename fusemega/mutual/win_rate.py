"""How often one policy's responses have the higher reward than another's, and which checkpoint is kept.

arXiv:2506.06292, the E step: each prompt has one response of the candidate and one of the policy before; the one of
higher reward wins; the candidate with the largest share of wins is kept, if that is at least tau.

Not published, and chosen here: equal rewards are half a win; a response that is missing (an empty one) loses to any
other; of equal win rates the earlier checkpoint is kept, which is nearer to the policy before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fusemega.errors import UserError


@dataclass(frozen=True)
class WinRate:
    """A share of wins.

    Attributes:
        wins, ties, losses: prompts of each kind.
    """

    wins: int
    ties: int
    losses: int

    @property
    def prompts(self) -> int:
        """How many were compared."""
        return self.wins + self.ties + self.losses

    @property
    def rate(self) -> float:
        """(wins + ties / 2) / prompts."""
        return (self.wins + self.ties / 2) / self.prompts

    def band(self, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
        """Percentiles of the rate over prompts drawn again with replacement, the bootstrap's.

        As a prompt counts 1, 1/2 or 0, such a draw is one of the multinomial distribution of the three counts.

        Args:
            resamples: draws.
            level: share of the draws between the two.
            seed: of the draws.
        """
        n = self.prompts
        shares = [self.wins / n, self.ties / n, self.losses / n]
        drawn = np.random.default_rng(seed).multinomial(n, shares, size=resamples)
        low, high = np.quantile((drawn[:, 0] + drawn[:, 1] / 2) / n, [(1 - level) / 2, (1 + level) / 2]).tolist()
        return low, high

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"rate": self.rate, **asdict(self), "prompts": self.prompts}


def win_rate(new: Sequence[float | None], old: Sequence[float | None]) -> WinRate:
    """The share of prompts at which the new policy's response has the higher reward.

    Args:
        new, old: reward of each prompt's response, in the same order; None: there is no response.

    Raises:
        UserError: a reward that is not finite; no prompts, or not equally many.

    >>> found = win_rate([0.3, 0.1, 0.2, None], [0.1, 0.1, 0.4, 0.0])
    >>> found, found.rate
    (WinRate(wins=1, ties=1, losses=2), 0.375)
    """
    if len(new) != len(old) or not new:
        raise UserError(f"rewards of {len(new)} and {len(old)} responses; they are compared prompt by prompt")
    if bad := [reward for reward in (*new, *old) if reward is not None and not math.isfinite(reward)]:
        raise UserError(f"a reward is a finite number, found {bad[0]}")
    pairs = [(_place(a), _place(b)) for a, b in zip(new, old, strict=True)]
    wins = sum(a > b for a, b in pairs)
    ties = sum(a == b for a, b in pairs)
    return WinRate(wins, ties, len(pairs) - wins - ties)


def _place(reward: float | None) -> float:
    return -math.inf if reward is None else reward


@dataclass(frozen=True)
class Choice:
    """Which checkpoint is the next policy.

    Attributes:
        checkpoint: its iteration.
        win_rate: of it.
        tau: what was asked.
    """

    checkpoint: int
    win_rate: float
    tau: float

    @property
    def is_kept(self) -> bool:
        """Whether it becomes the next policy. Otherwise the policy before stays, and the work ends."""
        return self.win_rate >= self.tau

    def why_stopped(self, iteration: int) -> str:
        """The reason for the record, where it is not kept.

        >>> Choice(50, 0.525, 0.6).why_stopped(2)
        'stopped at 2, win rate 0.5250 < tau 0.6'
        """
        return f"stopped at {iteration}, win rate {self.win_rate:.4f} < tau {self.tau:g}"


def choose(rates: Mapping[int, float], tau: float) -> Choice:
    """The best checkpoint.

    Args:
        rates: checkpoint's iteration -> win rate against the policy before.
        tau: the least win rate with which a checkpoint is kept.

    Raises:
        UserError: there is no checkpoint, or tau is no share.

    >>> choose({50: 0.61, 100: 0.7, 150: 0.7}, tau=0.6)
    Choice(checkpoint=100, win_rate=0.7, tau=0.6)
    """
    if not rates:
        raise UserError("no checkpoint to choose from")
    if not 0 <= tau <= 1:
        raise UserError(f"tau: {tau:g} is no share; allowed: 0 to 1")
    best = min(rates, key=lambda iteration: (-rates[iteration], iteration))
    return Choice(best, rates[best], tau)
