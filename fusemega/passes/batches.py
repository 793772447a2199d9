"""A global batch of samples, cut into this rank's micro-batches; the same samples whatever the layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from fusemega.errors import UserError
from fusemega.passes.micro_batch import Fields, FieldShapes, MicroBatch, collate
from fusemega.runtime.layout import ParallelConfig
from fusemega.runtime.parallel import World
from fusemega.runtime.together import on_main
from fusemega.text.data import DataConfig
from fusemega.text.dataset import TokenizedDataset, prepare
from fusemega.text.order import sample_ids
from fusemega.text.packing import deal, micro_batch_tokens, pack, padded, room, shared_beginning
from fusemega.text.sample import Sample
from fusemega.text.tokenizer import Tokenizer


class HeldSamples(Protocol):
    """Samples by number: a `TokenizedDataset`, or what a pass of its own makes.

    Attributes:
        lengths: int64, tokens of each.
    """

    @property
    def lengths(self) -> np.ndarray: ...

    def __getitem__(self, i: int, /) -> Sample: ...

    def ids(self, i: int, /) -> np.ndarray:
        """int32, the tokens of one."""
        ...


@dataclass(frozen=True)
class RowShape:
    """How samples are laid into rows.

    Rows are filled up to `seq_length`. A micro-batch ends where its samples end, rounded up to a multiple of `unit`.

    Attributes:
        seq_length: largest number of tokens in a row.
        micro_batch_size: rows of a forward pass.
        packing: whether a row holds several samples, or one.
        pad_id: token id of the padding.
        unit: a micro-batch's tokens are a multiple of it (`Precision.row_unit`).
        unscored_id: of a reward model, id that it takes for padding: a sequence's score is not read there.
        share_prefix: whether what the samples of a group begin with lies in its row once.
    """

    seq_length: int
    micro_batch_size: int
    packing: bool
    pad_id: int
    unit: int
    unscored_id: int | None = None
    share_prefix: bool = False


@dataclass(frozen=True)
class GlobalBatch:
    """This data-parallel rank's share of some samples.

    Attributes:
        micro_batches: in order; every rank has the same number.
        samples: the samples of each micro-batch, in the order of its supervised positions. They are whole even if
            context parallelism gives this rank only a part of their tokens.
        num_tokens: tokens of all samples on all ranks, padding not counted; those of a shared beginning count for each.
    """

    micro_batches: list[MicroBatch]
    samples: list[list[Sample]]
    num_tokens: int

    def on(self, device: torch.device) -> GlobalBatch:
        """The same with its tensors on `device`; the host does not wait for the copies."""
        return replace(self, micro_batches=[batch.to(device) for batch in self.micro_batches])


def global_batch(
    dataset: HeldSamples, groups: Sequence[Sequence[int]], fields: Fields, shape: RowShape, world: World
) -> GlobalBatch:
    """Pack groups of samples, deal the rows over data parallelism and collate this rank's part.

    A group is whole in one row, so in one micro-batch of one data-parallel rank; context-parallel ranks share it.
    The tensors are in host memory. If the device is a GPU, it is pinned memory, from which copies need no wait.
    """
    multiple = world.layout.segment_multiple
    lengths = dataset.lengths[np.concatenate([np.asarray(group, dtype=np.int64) for group in groups])]
    sizes = [len(group) for group in groups]
    shared = [_shared(dataset, group) if shape.share_prefix else 0 for group in groups]
    # Attention's work grows with the square of a sample's length; `deal` gives all ranks about equal work.
    places, work = room(lengths, sizes, shared, multiple)
    bins = pack(places, shape.seq_length, shape.packing)
    hands = deal(bins, work, world.dp_size, shape.micro_batch_size, world.layout.micro_batch_multiple)
    micro_batches, samples = [], []
    # A micro-batch without samples needs the fields' shapes too; any of the groups has them.
    like = FieldShapes.of(fields, [dataset[int(i)] for i in groups[0]])
    hand = hands[world.dp_rank]
    alike = hands if world.layout.rows_alike else [hand]
    tokens_of = [micro_batch_tokens(each, places, shape.unit, world.pp_size > 1) for each in alike]
    for bins, tokens in zip(hand, map(max, zip(*tokens_of, strict=True)), strict=True):
        held = [[dataset[int(i)] for i in groups[number]] for row in bins for number in row]
        batch = collate(held, fields, tokens, shape.pad_id, like, multiple, shape.unscored_id, shape.share_prefix)
        if world.cp_size > 1:
            batch = batch.context_part(world.cp_rank, world.cp_size)
        micro_batches.append(batch.pinned() if world.device.type == "cuda" else batch)
        samples.append([sample for group in held for sample in group])
    return GlobalBatch(micro_batches, samples, int(lengths.sum()))


def compared(dataset: TokenizedDataset, unit: int, fields: Fields) -> Sequence[int]:
    """The samples of a group that its comparisons are about; the others need no pass. All, if there are none.

    Comparisons of these samples alone must be the same: a best and a worst response remain that.
    """
    samples = dataset.unit(unit)
    if len(samples) == 1:
        return samples
    members_CK, _ = fields.comparisons([dataset[i] for i in samples])
    return [samples[place] for place in np.unique(members_CK)] if members_CK.size else samples


@dataclass(frozen=True)
class TrainingData:
    """The batches of a training run, by iteration: a pure function of the data, the seed and the iteration.

    For grouped data, a global batch is `global_batch_size` whole groups.
    """

    dataset: TokenizedDataset
    fields: Fields
    shape: RowShape
    global_batch_size: int
    seed: int
    world: World

    def step(self, iteration: int) -> GlobalBatch:
        """The batch of `iteration` (from 0), in host memory."""
        units = sample_ids(iteration, self.global_batch_size, self.dataset.num_units, self.seed)
        groups = [compared(self.dataset, int(i), self.fields) for i in units]
        return global_batch(self.dataset, groups, self.fields, self.shape, self.world)

    def consumed_samples(self, iteration: int) -> int:
        """Samples that the finished iterations have used; for grouped data, groups."""
        return iteration * self.global_batch_size


def _shared(dataset: HeldSamples, group: Sequence[int]) -> int:
    """How many tokens the samples of a group begin with."""
    return shared_beginning([dataset.ids(int(i)) for i in group])


def check_groups(
    dataset: TokenizedDataset, seq_length: int, parallel: ParallelConfig, share_prefix: bool = False
) -> None:
    """Refuses a group that does not fit in one row once each of its segments is padded as the layout asks.

    Raises:
        UserError: names the row.
    """
    multiple = parallel.segment_multiple
    sizes = np.diff([*dataset.starts, len(dataset)])
    shared = np.zeros(len(sizes), dtype=np.int64)
    places, _ = room(dataset.lengths, sizes, shared, multiple)
    if share_prefix:
        for number in np.flatnonzero(places > seq_length):
            shared[number] = _shared(dataset, dataset.unit(int(number)))
        places, _ = room(dataset.lengths, sizes, shared, multiple)
    longest = int(places.argmax())
    if places[longest] > seq_length:
        source = dataset[dataset.unit(longest)[0]].source
        once = f", {shared[longest]} of them shared" if share_prefix else ""
        raise UserError(
            f"{source}: its {sizes[longest]} responses take {places[longest]} tokens{once}, each padded to a "
            f"multiple of {multiple} for context_parallel_size {parallel.context_parallel_size}, more than "
            f"data.seq_length ({seq_length}): a group lies in one row; data.max_length: "
            f"{_fitting(seq_length, sizes[longest], shared[longest], multiple)} would let it fit"
        )


def _fitting(seq_length: int, size: int, shared: int, multiple: int) -> int:
    """The most tokens that each of `size` samples may have in a row, with `shared` of them in it once."""
    left = seq_length - int(padded(shared, multiple))
    return int(shared + left // size // multiple * multiple)


def prepare_together(
    config: DataConfig, tokenizer: Tokenizer, cache: Path, vocab_size: int, world: World, share_prefix: bool = False
) -> TokenizedDataset:
    """The tokenized data on every rank: the main one builds the cache, the others open it. Collective.

    Args: as those of `prepare`.

    Raises:
        UserError: as `fusemega.text.dataset.prepare`, on every rank.
    """

    def build() -> None:
        prepare(config, tokenizer, cache, vocab_size=vocab_size, progress=True, share_prefix=share_prefix)

    on_main(world, build)
    return prepare(config, tokenizer, cache, vocab_size=vocab_size, share_prefix=share_prefix)
