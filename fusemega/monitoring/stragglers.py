"""The rank that is slower than its peers: named when it stays so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

_TIMES = 3  # in a row, before a rank is named


@dataclass(frozen=True)
class RankTime:
    """What one rank needed by itself since the last comparison.

    Attributes:
        host: its node.
        stage: its pipeline stage; only ranks of one stage are compared, because stages differ in their work.
        seconds: in forward passes.
        waited: seconds for its own batches to be read and packed.
        tokens: of these forward passes.
    """

    host: str
    stage: int
    seconds: float
    waited: float
    tokens: int

    @property
    def pace(self) -> float:
        """Seconds a token."""
        return (self.seconds + self.waited) / max(1, self.tokens)


@dataclass(frozen=True)
class Slowest:
    """The rank that is slowest beside its peers.

    Attributes:
        rank: its number.
        ratio: its seconds a token, divided by the median of its peers'.
    """

    rank: int
    ratio: float


def slowest(times: Sequence[RankTime]) -> Slowest | None:
    """The slowest rank; None where no rank has a peer.

    Args:
        times: by rank.

    Example:
        >>> usual, slow = RankTime("a", 0, 1.0, 0.0, 100), RankTime("b", 0, 1.5, 0.0, 100)
        >>> slowest([usual, usual, slow])
        Slowest(rank=2, ratio=1.5)
    """
    found = []
    for rank, own in enumerate(times):
        peers = [other.pace for i, other in enumerate(times) if i != rank and other.stage == own.stage]
        if peers and median(peers) > 0:
            found.append(Slowest(rank, own.pace / median(peers)))
    return max(found, key=lambda each: each.ratio, default=None)


class Stragglers:
    """Says which rank stays slower than its peers: once, when it has been so three times in a row.

    Args:
        ratio: how much slower counts.
    """

    def __init__(self, ratio: float) -> None:
        self._ratio, self._rank, self._times = ratio, -1, 0

    def compare(self, times: Sequence[RankTime]) -> tuple[Slowest | None, str | None]:
        """The slowest rank of this comparison, and what is to be said."""
        found = slowest(times)
        if found is None or found.ratio < self._ratio:
            self._rank, self._times = -1, 0
            return found, None
        self._rank, self._times = found.rank, self._times + 1 if found.rank == self._rank else 1
        if self._times != _TIMES:
            return found, None
        own = times[found.rank]
        share = own.waited / (own.seconds + own.waited)
        data = f"; {share:.0%} of that is waiting for its data" if share > 0.2 else ""
        line = (
            f"rank {found.rank} on {own.host} is slower than the other ranks of its pipeline stage: {found.ratio:.2f} "
            f"times their median for a token, in {_TIMES} comparisons in a row{data}"
        )
        return found, line
