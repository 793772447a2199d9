"""The search's rounds: in each, one block more is removed, or two neighbours: those whose removal costs least.

Candidates are dealt over data-parallel ranks, each of which has all calibration data. Ties go to the first block in the
reference's order: attention blocks by layer, then MLPs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fusemega.prune.constraint import Constraint, removable
from fusemega.prune.masked_runs import Found, MaskedRuns
from fusemega.prune.order import OrderType, Removal
from fusemega.prune.run_file import ExactSearch, Racing, SearchSettings, TopM
from fusemega.runtime.parallel import World


@dataclass(frozen=True)
class Round:
    """One removal.

    Attributes:
        removed: the blocks.
        costs: of the model without the first of them, and so on, summed over all rows.
        candidates: what was found of each measured removal. One whose run ended early has fewer rows than there are,
            and its cost is a lower bound; racing leaves removals behind in the same way.
    """

    removed: Removal
    costs: tuple[float, ...]
    candidates: Mapping[Removal, Found]

    @property
    def cost(self) -> float:
        """Of the model without all of them."""
        return self.costs[-1]


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
        self._last: dict[Removal, float] = {}  # what each removal cost when it was last measured
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
        self._last |= {removal: each.cost - self._base for removal, each in found.candidates.items()}
        self._last.pop(found.removed)
        self._base = found.cost
        self._left -= len(found.removed)

    def _round(self) -> Round:
        allowed = removable(self._runs.kept, self._type, self._constraint, self._left)
        self.plain_evaluations += len(allowed)
        self.plain_blocks += sum(len(self._runs.kept) - len(removal) for removal in allowed) * self._rows
        candidates = self._by_last(allowed)
        match self._settings:
            case TopM(m=m):
                never = sum(removal not in self._last for removal in candidates)
                candidates = candidates[: max(m, never)]
                found = self._race(candidates, [self._rows], 1.0)
            case Racing(first_share=share, keep=keep):
                found = self._race(candidates, _ends(self._rows, share), keep)
            case ExactSearch(early_stop=early_stop):
                found = self._exact(candidates, early_stop)
            case _:
                raise TypeError(self._settings)
        whole = {removal: each.cost for removal, each in found.items() if each.rows == self._rows}
        removed = min(whole, key=lambda removal: (whole[removal], removal))
        before = [self._runs.masked(removed[:number]).cost for number in range(1, len(removed))]
        return Round(removed, (*before, whole[removed]), found)

    def _by_last(self, removals: Sequence[Removal]) -> list[Removal]:
        """Those that cost least when they were last measured come first, and before them those never measured.

        The lowest cost is then found early, and runs that exceed it end early.
        """
        return sorted(removals, key=lambda removal: (self._last.get(removal, -math.inf), removal))

    def _exact(self, candidates: Sequence[Removal], early_stop: bool) -> dict[Removal, Found]:
        best, own = math.inf, {}
        for removal in self._mine(candidates):
            own[removal] = self._runs.masked(removal, best if early_stop else math.inf)
            if own[removal].rows == self._rows:
                best = min(best, own[removal].cost)
            self._advance(self._rows)
        self.evaluations += len(candidates)
        return self._gathered(own)

    def _race(self, candidates: Sequence[Removal], ends: Sequence[int], keep: float) -> dict[Removal, Found]:
        """All candidates run up to the first of the `ends`; the share `keep` of them on to the next, and so on."""
        found: dict[Removal, Found] = {}
        begin, alive = 0, list(candidates)
        for end in ends:
            part = {each: self._runs.masked(each, begin=begin, end=end) for each in self._told(alive, end - begin)}
            for removal, more in self._gathered(part).items():
                cost = found[removal].cost if removal in found else 0.0
                found[removal] = Found(cost + more.cost, end)
            alive = sorted(alive, key=lambda removal: (found[removal].cost, removal))
            if end < self._rows:
                alive = alive[: math.ceil(keep * len(alive))]
            begin = end
        self.evaluations += len(candidates)
        return found

    def _mine(self, candidates: Sequence[Removal]) -> Sequence[Removal]:
        return candidates[self._world.dp_rank :: self._world.dp_size]

    def _told(self, candidates: Sequence[Removal], rows: int) -> Iterator[Removal]:
        for removal in self._mine(candidates):
            yield removal
            self._advance(rows)

    def _gathered(self, own: dict[Removal, Found]) -> dict[Removal, Found]:
        """What all replicas found, in one order."""
        parts = self._world.from_all(own)
        found = {removal: each for part in parts for removal, each in part.items()}
        return {removal: found[removal] for removal in sorted(found)}


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
