"""A micro-batch: one packed row of samples, with all that a model and an objective read of it.

Everything in it belongs to one of these: a supervised position, a sequence (a sample), a group of sequences (a pair, or
the responses to one prompt), or a comparison inside a group. A sequence that is in no group is a group of its own.

The tokens that all sequences of a group begin with may lie in the row once, as a segment that the others continue. The
hidden state of its last token then predicts the first own token of each, and so belongs to several positions.

Shape suffixes: T tokens of the row (R of them on this context-parallel rank), N supervised positions, S sequences,
B groups, C comparisons, K sequences of a comparison, L tokens of a sequence, P supervised positions of one, M sums of a
sequence. N, S, B and C may be 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusemega.passes.answers import Answer
from fusemega.runtime.context_parallel import zigzag
from fusemega.runtime.segments import NO_PREFIX, Prefix
from fusemega.text.packing import padded, shared_beginning
from fusemega.text.sample import Sample

Arrays = Mapping[str, np.ndarray]


class Fields:
    """What a micro-batch carries besides tokens, labels and bounds: nothing, unless a subclass says otherwise.

    Arrays of one name have the same shape (except P) and dtype for every sample or group.
    """

    def position_fields(self, sample: Sample) -> Arrays:
        """Arrays [P, ...] of one sample; the micro-batch has them as tensors [N, ...]."""
        return {}

    def sequence_fields(self, sample: Sample) -> Arrays:
        """Arrays [...] of one sample; the micro-batch has them as tensors [S, ...]."""
        return {}

    def token_fields(self, sample: Sample) -> Arrays:
        """Indices int64 [...] of tokens of one sample; the micro-batch has them as tensors [S, ...], indices into its
        own tokens."""
        return {}

    def group_fields(self, samples: Sequence[Sample]) -> Arrays:
        """Arrays [...] of the samples of one group; the micro-batch has them as tensors [B, ...]."""
        return {}

    def comparisons(self, samples: Sequence[Sample]) -> tuple[np.ndarray, Arrays]:
        """What the loss compares in one group: int64 [C, K], the places among `samples` of the K members of each
        comparison, such as the chosen and the rejected one; and arrays [C, ...] by name. C may be 0.

        The micro-batch has them as `members` and `comparison_fields`. Samples that are in no comparison are left out,
        unless a group has none at all; so the comparisons of the others must not depend on them.
        """
        return np.empty((0, 0), dtype=np.int64), {}

    def token_weights(self, samples: Sequence[Sample]) -> Sequence[np.ndarray] | None:
        """For M weighted sums of each sequence's log-probabilities: of each sample of one group float64 [P, M], the
        weight of each supervised token in each sum. None, of every group: the plain sum."""
        return None


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One packed row, or this context-parallel rank's part of it.

    Attributes:
        tokens, position_ids: int64 [1, T]; positions restart at each segment, or go on from what it continues. Under
            context parallelism [1, R].
        cu_seqlens: int32 [segments + 1], where the segments of the whole row begin and end: the sequences (before those
            that share a beginning, this), each padded inside its own segment where the layout asks for it, and the
            padding at the row's end.
        bounds: the same numbers on the host, where reading them needs no wait for the device.
        prefixes: for each segment, the tokens of the row that it continues; on the host.
        texts: for each segment, the tokens of the text that it ends, without padding; on the host.
        max_seqlen: tokens of the longest segment, with what it continues.
        positions: int64 [N], indices into T (into R) of the tokens whose next token is supervised; one index for each
            sequence, so of a shared token several times.
        labels: int64 [N], those next tokens.
        sequences: int64 [N], the sequence that each position belongs to.
        sequence_tokens: int64 [S], how many supervised positions each sequence has, on all context-parallel ranks.
        last_tokens: int64 [S], index into T (into R) of each sequence's last token; -1 where another context-parallel
            rank has it.
        token_fields: the objective's, by name: int64 [S, ...], indices as in `last_tokens`.
        groups: int64 [S], the group that each sequence belongs to, in ascending order.
        group_sizes: int64 [B], how many sequences each group has.
        sources: the row of data of each sequence, as "file:row", for messages; on the host.
        members: int64 [C, K], the sequences of each comparison (`Fields.comparisons`).
        position_fields, sequence_fields, group_fields, comparison_fields: the objective's, by name: tensors [N, ...],
            [S, ...], [B, ...], [C, ...].
        token_weights: float64 [N, M], where the objective wants weighted sums of log-probabilities.
        kept: int64 [N], under context parallelism: which of the whole row's positions these are; else None.
        num_positions: supervised positions of the whole row.
        answers: each frozen model's answer for the row, by name, on the last pipeline stage.
    """

    tokens: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    bounds: tuple[int, ...]
    prefixes: tuple[Prefix, ...]
    max_seqlen: int
    positions: Tensor
    labels: Tensor
    sequences: Tensor
    sequence_tokens: Tensor
    last_tokens: Tensor
    groups: Tensor
    group_sizes: Tensor
    sources: tuple[str, ...]
    position_fields: Mapping[str, Tensor] = field(default_factory=dict)
    sequence_fields: Mapping[str, Tensor] = field(default_factory=dict)
    group_fields: Mapping[str, Tensor] = field(default_factory=dict)
    members: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))
    comparison_fields: Mapping[str, Tensor] = field(default_factory=dict)
    token_weights: Tensor | None = None
    token_fields: Mapping[str, Tensor] = field(default_factory=dict)
    kept: Tensor | None = None
    num_positions: int = 0
    texts: tuple[int, ...] = ()
    answers: Mapping[str, Answer] = field(default_factory=dict)

    def to(self, device: torch.device) -> MicroBatch:
        """The same with its tensors on `device`; the host does not wait for the copies."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> MicroBatch:
        """The same in pinned memory, from which copies to a GPU need no wait."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        def changed(value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(value)
            return {name: changed(each) for name, each in value.items()} if isinstance(value, Mapping) else value

        return replace(self, **{each.name: changed(getattr(self, each.name)) for each in fields(self)})

    def context_part(self, rank: int, size: int) -> MicroBatch:
        """The part of a whole row for context-parallel rank `rank` of `size`; segments are multiples of 2 x size.

        It has this rank's tokens in zigzag order, the supervised positions among them, and their fields. What belongs
        to sequences and groups stays whole: each of the ranks computes the same loss for them.
        """
        mine = zigzag(self.cu_seqlens, rank, size)
        # Index in the whole row -> index in this part; -1: the token is on another rank.
        place = torch.full((self.tokens.size(1),), -1, dtype=torch.int64)
        place[mine] = torch.arange(len(mine))
        positions = place[self.positions]
        kept = (positions >= 0).nonzero().flatten()
        return replace(
            self,
            tokens=self.tokens[:, mine],
            position_ids=self.position_ids[:, mine],
            positions=positions[kept],
            labels=self.labels[kept],
            sequences=self.sequences[kept],
            last_tokens=place[self.last_tokens],
            token_fields={name: place[indices] for name, indices in self.token_fields.items()},
            position_fields={name: values[kept] for name, values in self.position_fields.items()},
            token_weights=None if self.token_weights is None else self.token_weights[kept],
            kept=kept,
        )


@dataclass(frozen=True)
class FieldShapes:
    """Shapes and dtypes of an objective's fields, taken from any group, for micro-batches without a sample."""

    position: Arrays
    sequence: Arrays
    group: Arrays
    members: np.ndarray
    comparison: Arrays
    weights: np.ndarray | None
    token: Arrays

    @classmethod
    def of(cls, fields: Fields, group: Sequence[Sample]) -> FieldShapes:
        """The shapes and dtypes of this group's fields."""
        weights = fields.token_weights(group)
        return cls(
            fields.position_fields(group[0]),
            fields.sequence_fields(group[0]),
            fields.group_fields(group),
            *fields.comparisons(group),
            None if weights is None else weights[0],
            fields.token_fields(group[0]),
        )


def collate(
    groups: Sequence[Sequence[Sample]],
    fields: Fields,
    num_tokens: int,
    pad_id: int,
    like: FieldShapes,
    multiple: int = 1,
    unscored_id: int | None = None,
    share_prefix: bool = False,
) -> MicroBatch:
    """One micro-batch, whole and in host memory: its samples one after the other, then padding up to T = `num_tokens`.

    Args:
        groups: the samples of each group.
        multiple: each segment is padded to a multiple of this.
        unscored_id: a sequence's last token is the last that is not this one; None: the last of all.
        share_prefix: what all samples of a group begin with lies in the row once.

    Raises:
        ValueError: the samples do not fit; a field lacks an entry for a supervised position, or its shape varies.
    """
    row = _Row(np.full(num_tokens, pad_id, dtype=np.int64), multiple)
    samples = [sample for group in groups for sample in group]
    places: list[np.ndarray] = []  # [L] of each sample: where in the row its tokens are
    for group in groups:
        shared = shared_beginning([sample.ids for sample in group]) if share_prefix else 0
        prefix = NO_PREFIX
        if shared:
            start = row.lay(group[0].ids[:shared], NO_PREFIX, group[0].source)
            prefix = start, start + shared
        for sample in group:
            own = row.lay(sample.ids[shared:], prefix, sample.source)
            places.append(np.append(np.arange(*prefix), np.arange(own, own + len(sample.ids) - shared)))
    row.close()
    segments = np.diff(row.bounds)
    before = np.array([end - start for start, end in row.prefixes])
    positions = [place[sample.positions] for place, sample in zip(places, samples, strict=True)]
    labels = [sample.ids[sample.positions + 1] for sample in samples]
    last_tokens = [place[_last_token(sample.ids, unscored_id)] for place, sample in zip(places, samples, strict=True)]
    token_fields: list[Arrays] = [
        {name: place[indices] for name, indices in fields.token_fields(sample).items()}
        for place, sample in zip(places, samples, strict=True)
    ]
    where = np.concatenate(positions) if positions else np.empty(0, dtype=np.int64)
    counts = np.array([len(part) for part in positions], dtype=np.int64)
    sizes = np.array([len(group) for group in groups], dtype=np.int64)
    position_fields = _joined([fields.position_fields(sample) for sample in samples], like.position, np.concatenate)
    for name, values in position_fields.items():
        if len(values) != len(where):
            raise ValueError(f"field {name!r} has {len(values)} entries for {len(where)} supervised positions")
    compared = [fields.comparisons(group) for group in groups]
    firsts = np.cumsum(sizes) - sizes
    members = [places + first for (places, _), first in zip(compared, firsts, strict=True)]
    weights: Tensor | None = None
    if like.weights is not None:
        parts = [part for group in groups for part in fields.token_weights(group) or ()]
        weights = torch.from_numpy(np.concatenate([like.weights[:0], *parts]))
    return MicroBatch(
        tokens=torch.from_numpy(row.tokens)[None],
        position_ids=torch.from_numpy(np.arange(num_tokens) - np.repeat(row.bounds[:-1] - before, segments))[None],
        cu_seqlens=torch.tensor(row.bounds, dtype=torch.int32),
        bounds=tuple(row.bounds),
        prefixes=tuple(row.prefixes),
        max_seqlen=int((segments + before).max()),
        positions=torch.from_numpy(where),
        labels=torch.from_numpy(np.concatenate([*labels, where[:0]]).astype(np.int64)),
        sequences=torch.from_numpy(np.repeat(np.arange(len(samples)), counts)),
        sequence_tokens=torch.from_numpy(counts),
        last_tokens=torch.tensor(last_tokens, dtype=torch.int64),
        groups=torch.from_numpy(np.repeat(np.arange(len(groups)), sizes)),
        group_sizes=torch.from_numpy(sizes),
        sources=tuple(sample.source for sample in samples),
        position_fields=position_fields,
        sequence_fields=_joined([fields.sequence_fields(sample) for sample in samples], like.sequence, np.stack),
        group_fields=_joined([fields.group_fields(group) for group in groups], like.group, np.stack),
        members=torch.from_numpy(np.concatenate([like.members[:0], *members])),
        comparison_fields=_joined([each for _, each in compared], like.comparison, np.concatenate),
        token_weights=weights,
        token_fields=_joined(token_fields, like.token, np.stack),
        num_positions=len(where),
        texts=tuple(row.texts),
    )


def _last_token(ids: np.ndarray, unscored_id: int | None) -> int:
    """Index of the last token that is not `unscored_id`; 0 if all are, as in transformers."""
    scored = np.flatnonzero(ids != unscored_id) if unscored_id is not None else np.arange(len(ids))
    return int(scored[-1]) if len(scored) else 0


class _Row:
    """A row's tokens and segments, as they are laid into it.

    Args:
        tokens: int64 [T], of padding.
        multiple: what each segment is padded to.
    """

    def __init__(self, tokens: np.ndarray, multiple: int) -> None:
        self.tokens, self._multiple = tokens, multiple
        self.bounds = [0]
        self.prefixes: list[Prefix] = []
        self.texts: list[int] = []

    def lay(self, ids: np.ndarray, prefix: Prefix, source: str) -> int:
        """Adds a segment, and returns where it begins. Raises ValueError, with the source, if it does not fit."""
        start, end = self.bounds[-1], self.bounds[-1] + int(padded(len(ids), self._multiple))
        if end > len(self.tokens):
            raise ValueError(f"{source}: the samples of a micro-batch exceed {len(self.tokens)} tokens")
        self.tokens[start : start + len(ids)] = ids
        self.bounds.append(end)
        self.prefixes.append(prefix)
        self.texts.append(prefix[1] - prefix[0] + len(ids))
        return start

    def close(self) -> None:
        """Makes the padding at the end a segment too, because cu_seqlens must cover the whole row."""
        if self.bounds[-1] < len(self.tokens):
            self.bounds.append(len(self.tokens))
            self.prefixes.append(NO_PREFIX)
            self.texts.append(0)


def _joined(parts: Sequence[Arrays], like: Arrays, join: Callable[[list[np.ndarray]], np.ndarray]) -> dict[str, Tensor]:
    """The joined fields of all samples or groups; if there are none, tensors of the right shape without entries."""
    if parts:
        return {name: torch.from_numpy(join([np.asarray(part[name]) for part in parts])) for name in like}
    return {
        name: torch.from_numpy((np.asarray(array) if join is np.concatenate else np.asarray(array)[None])[:0])
        for name, array in like.items()
    }
