"""A model run with some blocks masked, beginning at the first block whose input has changed.

What each block reads is kept for every row of the calibration data. A candidate's run begins at its own block; after a
removal only what comes behind the removed block is computed again. Memory is bounded: with too little of it, only every
n-th block's input is kept, and a run begins at the nearest kept one before its block.

Stages before the candidate's have nothing to do for it. The candidate's stage begins with what it has kept and hands
the stream on, row by row, so all stages behind it work at the same time.

Shape suffixes: T tokens, N supervised positions, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fusemega.prune.order import Removal, ResidualBlock
from fusemega.prune.stage import CalibrationRow, StageBlocks

# (hidden_NH, row, its number) -> a scalar in fp64, on the device; called on the last stage
Cost = Callable[[torch.Tensor, CalibrationRow, int], torch.Tensor]
_ROWS_BETWEEN_CHECKS = 4  # for each stage of a pipeline, which runs empty at a check


@dataclass(frozen=True)
class Found:
    """A candidate's cost.

    Attributes:
        cost: the sum over the rows that were run.
        rows: how many of them.
    """

    cost: float
    rows: int


class MaskedRuns:
    """Runs over the same rows with changing sets of masked blocks. Every method is collective over the replica.

    Args:
        stage: this rank's blocks.
        rows: the calibration data, the same on every replica.
        cost: what the last stage computes of a row.
        cache_bytes: for the kept inputs of blocks on this rank; None: as much as they need.

    Attributes:
        kept: the blocks that are not removed, of the whole model.
        head_rows: how often the cost of a row was computed.
        stride: of this stage's blocks every `stride`-th has its input kept.
    """

    def __init__(
        self, stage: StageBlocks, rows: Sequence[CalibrationRow], cost: Cost, cache_bytes: int | None = None
    ) -> None:
        self._stage, self._rows, self._cost = stage, rows, cost
        self.kept = list(stage.blocks)
        self.head_rows = 0
        self._entries: list[torch.Tensor] = []  # of each row, what this stage begins with
        self._inputs: list[dict[ResidualBlock, torch.Tensor]] = [{} for _ in rows]
        config, world = stage.gpt.config, stage.world
        split = world.tp_size if world.sequence_parallel else 1
        tokens = sum(row.batch.tokens.size(1) // split for row in rows)
        each = tokens * config.hidden_size * torch.finfo(config.params_dtype).bits // 8
        # What the stage begins with is always kept, and is the first block's input as well.
        places = len(stage.own) if cache_bytes is None else max(1, cache_bytes // max(each, 1))
        self.stride = max(1, math.ceil(len(stage.own) / places))

    @property
    def cached_bytes(self) -> int:
        """Memory of the kept inputs on this rank."""
        tensors = {id(t): t for t in [*self._entries, *(t for kept in self._inputs for t in kept.values())]}
        return sum(t.numel() * t.element_size() for t in tensors.values())

    @torch.no_grad()
    def start(self) -> Found:
        """Runs the whole model and keeps what the blocks read. Returns its cost."""
        costs = []
        for number, row in enumerate(self._rows):
            hidden = self._stage.begin(row)
            self._entries.append(hidden)
            hidden = self._walk(number, hidden, self._own(), keep=True)
            costs += self._end(number, hidden)
        return Found(self._stage.agreed(costs), len(self._rows))

    @torch.no_grad()
    def remove(self, blocks: Removal) -> None:
        """Removes blocks for good, and computes again what is read behind the first of them."""
        self.kept = [block for block in self.kept if block not in blocks]
        first = blocks[0]
        if self._is_done_before(first):
            return
        for number, row in enumerate(self._rows):
            if first in self._stage.own:
                begin, hidden = self._nearest(number, first)
                inputs = self._inputs[number]
                for stale in [other for other in inputs if other.place >= first.place]:
                    del inputs[stale]
            else:
                begin, hidden = None, self._stage.begin(row)
                self._entries[number] = hidden
                self._inputs[number] = {}
            own = [other for other in self._own() if begin is None or other.place >= begin.place]
            hidden = self._walk(number, hidden, own, keep=True)
            if not self._stage.world.is_last_stage:
                self._stage.hand_on(hidden)

    @torch.no_grad()
    def masked(self, blocks: Removal, limit: float = math.inf, begin: int = 0, end: int | None = None) -> Found:
        """The cost without some blocks, besides those removed, over the rows from `begin` to `end`.

        Args:
            blocks: in the order of the stream.
            limit: the run ends early, after some rows, once the sum exceeds this. Costs are not negative, so the whole
                sum would exceed it too.
        """
        total, done = 0.0, begin
        last = len(self._rows) if end is None else end
        pipeline = self._stage.world.pp_size
        step = last - begin if math.isinf(limit) else 1 if pipeline == 1 else pipeline * _ROWS_BETWEEN_CHECKS
        while done < last and total <= limit:
            part = range(done, min(done + step, last))
            total += self._stage.agreed([cost for number in part for cost in self._without(number, blocks)])
            done = part.stop
        return Found(total, done - begin)

    def _without(self, number: int, blocks: Removal) -> list[torch.Tensor]:
        if self._is_done_before(blocks[0]):
            return []
        own = [block for block in self._own() if block not in blocks]
        if blocks[0] in self._stage.own:
            begin, hidden = self._nearest(number, blocks[0])
            own = [block for block in own if begin is None or block.place >= begin.place]
        else:
            hidden = self._stage.begin(self._rows[number])
        return self._end(number, self._walk(number, hidden, own, keep=False))

    def _own(self) -> list[ResidualBlock]:
        """This stage's blocks that are not removed."""
        own = set(self._stage.own)
        return [block for block in self.kept if block in own]

    def _is_done_before(self, block: ResidualBlock) -> bool:
        """Whether all blocks of this stage come before `block`'s stage."""
        return bool(self._stage.own) and block.place > self._stage.own[-1].place

    def _nearest(self, number: int, block: ResidualBlock) -> tuple[ResidualBlock | None, torch.Tensor]:
        """The last block up to `block` whose input is kept, with it; None: the stage's first."""
        inputs = self._inputs[number]
        before = [other for other in inputs if other.place <= block.place]
        if not before:
            return None, self._entries[number]
        nearest = max(before, key=lambda other: other.place)
        return nearest, inputs[nearest]

    def _walk(self, number: int, hidden: torch.Tensor, own: Sequence[ResidualBlock], keep: bool) -> torch.Tensor:
        """Runs blocks of this stage; `keep`: keeps their inputs, as far as memory allows."""
        row = self._rows[number]
        places = {block: i for i, block in enumerate(self._own())} if keep else {}
        for block in own:
            if keep and places[block] % self.stride == 0:
                self._inputs[number][block] = hidden
            hidden = self._stage.run(block, hidden, row)
        return hidden

    def _end(self, number: int, hidden: torch.Tensor) -> list[torch.Tensor]:
        """The row's cost, on the last stage; elsewhere the stream goes on to the next."""
        if not self._stage.world.is_last_stage:
            self._stage.hand_on(hidden)
            return []
        self.head_rows += 1
        row = self._rows[number]
        return [self._cost(self._stage.final(hidden, row), row, number)]
