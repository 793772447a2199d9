"""A model over a data set, forward only: what evaluation during training, `eval` and `teach` share.

Shapes: N supervised positions of a micro-batch, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from fusemega.models.build import GPT
from fusemega.runtime.parallel import World
from fusemega.text.dataset import TokenizedDataset
from fusemega.text.sample import Sample
from fusemega.training.batches import GlobalBatch, RowShape, global_batch, no_fields
from fusemega.training.forward import Batch, run_schedule
from fusemega.training.prefetch import Prefetch

# Rows of a pass for each data-parallel rank: enough micro-batches to fill a pipeline, few enough to report often.
ROWS_PER_PASS = 16

# (hidden_NH, batch, samples) -> whatever the pass collects on the last stage
ScoreFunction = Callable[[torch.Tensor, Batch, Sequence[Sample]], Any]


@torch.no_grad()
def score_samples(
    gpt: GPT,
    dataset: TokenizedDataset,
    ids: Sequence[int],
    shape: RowShape,
    score: ScoreFunction,
    world: World,
) -> Iterator[tuple[int, list[Any]]]:
    """`score` of every micro-batch of the samples `ids`, pass by pass.

    Yields:
        (samples done so far on all ranks, what `score` returned for this rank's micro-batches of the pass; empty except
        on the last stage). The same number of times on every rank.
    """
    gpt.eval()
    per_pass = ROWS_PER_PASS * shape.micro_batch_size * world.dp_size
    # Samples of similar length share a pass; rows then pack well.
    ordered = sorted(ids, key=lambda i: -int(dataset.lengths[i]))
    parts = [ordered[start : start + per_pass] for start in range(0, len(ordered), per_pass)]

    def build(number: int) -> GlobalBatch:
        return global_batch(dataset, parts[number], no_fields, shape, world)

    done = 0
    with Prefetch(build, world.device, len(parts)) as batches:
        for number, part in enumerate(parts):
            batch = batches.take(number).on(world.device)
            samples = iter(batch.samples)

            def loss(
                hidden_NH: torch.Tensor, micro: Batch, samples: Iterator[list[Sample]] = samples
            ) -> tuple[torch.Tensor, Any]:
                return hidden_NH.new_zeros(()), score(hidden_NH, micro, next(samples))

            done += len(part)
            yield done, run_schedule(list(gpt.chunks), batch.micro_batches, loss, world, forward_only=True)
