"""The search's rounds: in each, one block more is removed, the one whose removal costs least.

Candidates are dealt over data-parallel ranks, each of which has all calibration data. Ties go to the first block in the
reference's order: attention blocks by layer, then MLPs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fusemega.prune.constraint import Constraint, removable
from fusemega.prune.masked_runs import Found, MaskedRuns
from fusemega.prune.order import OrderType, ResidualBlock
from fusemega.prune.run_file import ExactSearch, Racing, SearchSettings, TopM
from fusemega.runtime.parallel import World


@dataclass(frozen=True)
class Round:
    """One removal.

    Attributes:
        removed: the block.
        cost: of the model without it, summed over all rows.
        candidates: what was found of each measured block. One whose run ended early has fewer rows than there are, and
            its cost is a lower bound; racing leaves blocks behind in the same way.
    """

    removed: ResidualBlock
    cost: float
    candidates: Mapping[ResidualBlock, Found]


class Rounds:
    """A search. Collective.

    Args:
        runs: started.
        rows: how many rows `runs` has.
        dense: the whole model's cost.
        count: how many blocks are removed.
        advance: told after each candidate how many rows its run had, or no longer has.

    Attributes:
        evaluations: candidates that were run on all replicas.
        plain_evaluations: as many as the plain search would run.
        plain_blocks: how often it would run a block for a row.
    """

    def __init__(
        self,
        runs: MaskedRuns,
        rows: int,
        dense: float,
        settings: SearchSettings,
        order_type: OrderType,
        constraint: Constraint,
        count: int,
        world: World,
        advance: Callable[[int], None] = lambda rows: None,
    ) -> None:
        self._runs, self._rows, self._base, self._settings = runs, rows, dense, settings
        self._type, self._constraint, self._left, self._world = order_type, constraint, count, world
        self._advance = advance
        self._last: dict[ResidualBlock, float] = {}  # what each block's removal cost when it was last measured
        self.evaluations = self.plain_evaluations = self.plain_blocks = 0

    def again(self, done: Round) -> None:
        """Repeats a removal of an interrupted search."""
        self._account(done)
        self._runs.remove(done.removed)

    def run(self) -> Iterator[Round]:
        """The rounds that are left."""
        while self._left:
            found = self._round()
            self._account(found)
            yield found
            if self._left:
                self._runs.remove(found.removed)

    def _account(self, found: Round) -> None:
        self._last |= {block: each.cost - self._base for block, each in found.candidates.items()}
        self._last.pop(found.removed)
        self._base = found.cost
        self._left -= 1

    def _round(self) -> Round:
        allowed = removable(self._runs.kept, self._type, self._constraint, self._left)
        self.plain_evaluations += len(allowed)
        self.plain_blocks += len(allowed) * (len(self._runs.kept) - 1) * self._rows
        candidates = self._by_last(allowed)
        match self._settings:
            case TopM(m=m):
                never = sum(block not in self._last for block in candidates)
                candidates = candidates[: max(m, never)]
                found = self._race(candidates, [self._rows], 1.0)
            case Racing(first_share=share, keep=keep):
                found = self._race(candidates, _ends(self._rows, share), keep)
            case ExactSearch(early_stop=early_stop):
                found = self._exact(candidates, early_stop)
            case _:
                raise TypeError(self._settings)
        whole = {block: each.cost for block, each in found.items() if each.rows == self._rows}
        removed = min(whole, key=lambda block: (whole[block], block))
        return Round(removed, whole[removed], found)

    def _by_last(self, blocks: Sequence[ResidualBlock]) -> list[ResidualBlock]:
        """Blocks whose removal cost least when it was last measured come first, and before them those never measured.

        The lowest cost is then found early, and runs that exceed it end early.
        """
        return sorted(blocks, key=lambda block: (self._last.get(block, -math.inf), block))

    def _exact(self, candidates: Sequence[ResidualBlock], early_stop: bool) -> dict[ResidualBlock, Found]:
        best, own = math.inf, {}
        for block in self._mine(candidates):
            own[block] = self._runs.masked(block, best if early_stop else math.inf)
            if own[block].rows == self._rows:
                best = min(best, own[block].cost)
            self._advance(self._rows)
        self.evaluations += len(candidates)
        return self._gathered(own)

    def _race(
        self, candidates: Sequence[ResidualBlock], ends: Sequence[int], keep: float
    ) -> dict[ResidualBlock, Found]:
        """All candidates run up to the first of the `ends`; the share `keep` of them on to the next, and so on."""
        found: dict[ResidualBlock, Found] = {}
        begin, alive = 0, list(candidates)
        for end in ends:
            part = {block: self._runs.masked(block, begin=begin, end=end) for block in self._told(alive, end - begin)}
            for block, more in self._gathered(part).items():
                cost = found[block].cost if block in found else 0.0
                found[block] = Found(cost + more.cost, end)
            alive = sorted(alive, key=lambda block: (found[block].cost, block))
            if end < self._rows:
                alive = alive[: math.ceil(keep * len(alive))]
            begin = end
        self.evaluations += len(candidates)
        return found

    def _mine(self, candidates: Sequence[ResidualBlock]) -> Sequence[ResidualBlock]:
        return candidates[self._world.dp_rank :: self._world.dp_size]

    def _told(self, candidates: Sequence[ResidualBlock], rows: int) -> Iterator[ResidualBlock]:
        for block in self._mine(candidates):
            yield block
            self._advance(rows)

    def _gathered(self, own: dict[ResidualBlock, Found]) -> dict[ResidualBlock, Found]:
        """What all replicas found, in one order."""
        parts = self._world.from_all(own)
        found = {block: each for part in parts for block, each in part.items()}
        return {block: found[block] for block in sorted(found)}


def _ends(rows: int, first_share: float) -> list[int]:
    """Where the stages of a race end: a share of the rows, twice it, ... all of them.

    Example:
        >>> _ends(10, 0.25)
        [3, 6, 10]
    """
    ends = [max(1, math.ceil(rows * first_share))]
    while ends[-1] < rows:
        ends.append(min(rows, 2 * ends[-1]))
    return ends
