"""A model over a data set, forward only: what evaluation during training, `eval` and `teach` share.

It hands out final hidden states at supervised positions (`score_samples`), or hidden states of any layer at all tokens
(`layer_states`).

Shape suffixes: T tokens of a micro-batch, N supervised positions of it, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from fusemega.models.build import GPT
from fusemega.passes.batches import GlobalBatch, HeldSamples, RowShape, global_batch
from fusemega.passes.forward import run_schedule, supervised_rows
from fusemega.passes.frozen import FrozenModel, ask_all
from fusemega.passes.layers import Point, handed_out
from fusemega.passes.micro_batch import Fields, MicroBatch
from fusemega.passes.prefetch import Prefetch
from fusemega.runtime.parallel import World
from fusemega.text.sample import Sample

# Rows of a pass for each data-parallel rank: enough micro-batches to fill a pipeline, few enough to report often.
ROWS_PER_PASS = 16

# (hidden_NH, batch, samples) -> whatever the pass collects on the last stage
ScoreFunction = Callable[[torch.Tensor, MicroBatch, Sequence[Sample]], Any]
# (point, hidden_TH, batch, samples) -> whatever the pass collects for it
SeeFunction = Callable[[Point, torch.Tensor, MicroBatch, Sequence[Sample]], Any]


@torch.no_grad()
def score_samples(
    gpt: GPT,
    dataset: HeldSamples,
    ids: Sequence[int],
    shape: RowShape,
    score: ScoreFunction,
    world: World,
    advance: Callable[[int], None] | None = None,
    frozen: Mapping[str, FrozenModel] = MappingProxyType({}),
    fields: Fields | None = None,
    rows: Callable[[MicroBatch], torch.Tensor] | None = None,
) -> Iterator[tuple[int, list[Any]]]:
    """Calls `score` for every micro-batch of the samples `ids`, pass by pass.

    Args:
        advance: called on every rank when it starts a micro-batch, with about the number of tokens that the one before
            had on all data-parallel ranks; and at a pass's end with the rest. The calls add up to all tokens.
        frozen: models that run over each pass's micro-batches first; `score` finds their answers in the batch's
            `answers`.
        fields: what the micro-batches carry besides tokens and labels; None: nothing.
        rows: picks the tokens whose hidden states `score` gets; None: the supervised positions.

    Yields:
        (samples done so far on all ranks, what `score` returned for this rank's micro-batches of the pass; empty except
        on the last stage). The same number of times on every rank.
    """
    gpt.eval()
    for done, part, batch in _passes(dataset, ids, shape, world, fields or Fields()):
        samples = iter(batch.samples)

        def loss(
            hidden_NH: torch.Tensor, micro: MicroBatch, samples: Iterator[list[Sample]] = samples
        ) -> tuple[torch.Tensor, Any]:
            return hidden_NH.new_zeros(()), score(hidden_NH, micro, next(samples))

        micro_batches = ask_all(frozen, batch.micro_batches)
        if advance is not None:
            micro_batches = _Counted(micro_batches, int(dataset.lengths[part].sum()), advance)
        picked = rows or supervised_rows
        collected = run_schedule(list(gpt.chunks), micro_batches, loss, world, forward_only=True, rows=picked)
        if isinstance(micro_batches, _Counted):
            micro_batches.finish()
        yield done, collected


@torch.no_grad()
def layer_states(
    gpt: GPT,
    dataset: HeldSamples,
    ids: Sequence[int],
    shape: RowShape,
    points: Sequence[Point],
    see: SeeFunction,
    world: World,
) -> Iterator[tuple[int, dict[Point, list[Any]]]]:
    """Calls `see` with the hidden states at the points, for every micro-batch of the samples `ids`, pass by pass.

    Args:
        points: layers, and places in them.
        see: called during the pass with [T, H], the states of all tokens of the micro-batch (under context parallelism,
            of this rank's part of each segment). Only what it keeps stays in memory.

    Yields:
        (samples done so far on all ranks, what `see` returned for this rank's micro-batches of the pass, by point;
        the points are those whose layers this rank's stage holds). The same number of times on every rank.

    Raises:
        ValueError: a point's layer is not in the model.
    """
    gpt.eval()
    for done, _, batch in _passes(dataset, ids, shape, world, Fields()):
        seen: dict[Point, list[Any]] = {}

        def hand_out(
            point: Point, hidden_TH: torch.Tensor, batch: GlobalBatch = batch, seen: dict[Point, list[Any]] = seen
        ) -> None:
            number = len(seen[point])
            seen[point].append(see(point, hidden_TH, batch.micro_batches[number], batch.samples[number]))

        with handed_out(gpt, points, hand_out, world) as held:
            seen |= {point: [] for point in held}
            run_schedule(list(gpt.chunks), batch.micro_batches, _nothing, world, forward_only=True)
        yield done, seen


def _nothing(hidden_NH: torch.Tensor, _: MicroBatch) -> tuple[torch.Tensor, None]:
    return hidden_NH.new_zeros(()), None


def _passes(
    dataset: HeldSamples, ids: Sequence[int], shape: RowShape, world: World, fields: Fields
) -> Iterator[tuple[int, list[int], GlobalBatch]]:
    """Yields for each pass (samples done at its end, numbers of its samples, its batch on the device)."""
    per_pass = ROWS_PER_PASS * shape.micro_batch_size * world.dp_size
    # Samples of similar length share a pass; rows then pack well.
    ordered = sorted(ids, key=lambda i: -int(dataset.lengths[i]))
    parts = [ordered[start : start + per_pass] for start in range(0, len(ordered), per_pass)]

    def build(number: int) -> GlobalBatch:
        return global_batch(dataset, [[i] for i in parts[number]], fields, shape, world)

    done = 0
    with Prefetch(build, world.device, len(parts)) as batches:
        for number, part in enumerate(parts):
            done += len(part)
            yield done, part, batches.take(number).on(world.device)


class _Counted(list[MicroBatch]):
    """Micro-batches that report progress when they are taken; each counts as an equal share of the pass's tokens."""

    def __init__(self, micro_batches: Sequence[MicroBatch], tokens: int, advance: Callable[[int], None]) -> None:
        super().__init__(micro_batches)
        self._tokens, self._told, self._taken, self._advance = tokens, 0, 0, advance

    def __iter__(self) -> Iterator[MicroBatch]:
        """Counts each micro-batch once, although the schedule takes it once for each chunk of layers of this rank."""
        for number, batch in enumerate(super().__iter__()):
            if number > self._taken:
                self._taken = number
                self._tell(self._tokens * number // len(self))
            yield batch

    def finish(self) -> None:
        """Reports the rest at the end of the pass."""
        self._tell(self._tokens)

    def _tell(self, done: int) -> None:
        self._advance(done - self._told)
        self._told = done
