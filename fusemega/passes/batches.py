"""A global batch of samples, cut into this rank's micro-batches; the same samples whatever the layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusemega.files.output import on_main
from fusemega.passes.forward import Batch
from fusemega.runtime.parallel import World
from fusemega.text.data import DataConfig
from fusemega.text.dataset import TokenizedDataset, prepare
from fusemega.text.order import sample_ids
from fusemega.text.packing import collate, context_part, deal, micro_batch_tokens, pack, padded
from fusemega.text.sample import Sample
from fusemega.text.tokenizer import Tokenizer

# An objective's arrays of one sample, one entry a supervised position.
SampleFields = Callable[[Sample], Mapping[str, np.ndarray]]


def no_fields(sample: Sample) -> Mapping[str, np.ndarray]:
    """For passes that need tokens and labels only."""
    return {}


@dataclass(frozen=True)
class RowShape:
    """How samples are laid into rows.

    Rows are filled up to `seq_length`; what no sample fills is left out of the micro-batch, up to `unit`.

    Attributes:
        seq_length: most tokens of a row.
        micro_batch_size: rows of a forward pass.
        packing: several samples a row, or one.
        pad_id: token id of the padding.
        unit: a micro-batch's tokens are a multiple of it (`Precision.row_unit`).
    """

    seq_length: int
    micro_batch_size: int
    packing: bool
    pad_id: int
    unit: int


@dataclass(frozen=True)
class GlobalBatch:
    """This data-parallel rank's share of some samples.

    Attributes:
        micro_batches: in order; as many on every rank.
        samples: those of each micro-batch, in the order of its supervised positions; whole, also where context
            parallelism gives this rank a part of their tokens.
        num_tokens: tokens of all samples on all ranks, padding not counted.
    """

    micro_batches: list[Batch]
    samples: list[list[Sample]]
    num_tokens: int

    def on(self, device: torch.device) -> GlobalBatch:
        """The same with its tensors on `device`; the host does not wait for the copies."""
        moved = [{name: _on(value, device) for name, value in batch.items()} for batch in self.micro_batches]
        return replace(self, micro_batches=moved)


def global_batch(
    dataset: TokenizedDataset, ids: Sequence[int] | np.ndarray, fields: SampleFields, shape: RowShape, world: World
) -> GlobalBatch:
    """Pack the samples `ids`, deal the rows over data parallelism and collate this rank's part.

    Its tensors are in host memory; where the rank's device is a GPU in pinned memory, from which copies need no wait.
    """
    lengths, multiple = dataset.lengths[np.asarray(ids)], world.layout.segment_multiple
    places = padded(lengths, multiple)
    bins = pack(places, shape.seq_length, shape.packing)
    hands = deal(bins, lengths, world.dp_size, shape.micro_batch_size, world.layout.micro_batch_multiple)
    micro_batches, samples = [], []
    like = fields(dataset[0])
    hand = hands[world.dp_rank]
    for bins, tokens in zip(hand, micro_batch_tokens(hand, places, shape.unit, world.pp_size > 1), strict=True):
        rows = [[dataset[int(ids[i])] for i in row] for row in bins]
        batch = collate(rows, fields, tokens, shape.pad_id, like, multiple)
        if world.cp_size > 1:
            batch = context_part(batch, like, world.cp_rank, world.cp_size)
        micro_batches.append(_pinned(batch) if world.device.type == "cuda" else batch)
        samples.append([sample for row in rows for sample in row])
    return GlobalBatch(micro_batches, samples, int(lengths.sum()))


@dataclass(frozen=True)
class TrainingData:
    """The batches of a training run, by iteration: a pure function of the data, the seed and the iteration."""

    dataset: TokenizedDataset
    fields: SampleFields
    shape: RowShape
    global_batch_size: int
    seed: int
    world: World

    def step(self, iteration: int) -> GlobalBatch:
        """The batch of `iteration` (from 0), in host memory."""
        ids = sample_ids(iteration, self.global_batch_size, len(self.dataset), self.seed)
        return global_batch(self.dataset, ids, self.fields, self.shape, self.world)

    def consumed_samples(self, iteration: int) -> int:
        """Samples that finished iterations have used."""
        return iteration * self.global_batch_size


def prepare_together(
    config: DataConfig, tokenizer: Tokenizer, cache: Path, vocab_size: int, world: World
) -> TokenizedDataset:
    """The tokenized data on every rank: the main one builds the cache, the others open it. Collective.

    Raises:
        UserError: as `fusemega.text.dataset.prepare`, on every rank.
    """

    def build() -> None:
        prepare(config, tokenizer, cache, vocab_size=vocab_size, progress=True)

    on_main(world, build)
    return prepare(config, tokenizer, cache, vocab_size=vocab_size)


def _pinned(batch: Batch) -> Batch:
    return {name: value.pin_memory() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
