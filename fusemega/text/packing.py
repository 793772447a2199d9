"""A global batch of samples -> bins (rows of seq_length tokens) -> the micro-batches of every data-parallel rank.

Everything is a deterministic function of the samples' lengths, and the samples of a global batch are the same
whatever the layout, the micro-batch size, and whether rows are packed. Attention never crosses a sample: each is a
segment of its own, and so is the padding at the end of a micro-batch. Context parallelism splits every segment, so
there each sample is padded to a multiple of 2 CP tokens, inside its segment.

Shapes: T tokens of a micro-batch, N supervised positions and S samples in it (either may be 0), R tokens and M
supervised positions of a context-parallel rank's part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fusemega.runtime.context_parallel import zigzag
from fusemega.text.sample import Sample

Bin = list[int]


def padded(lengths: Sequence[int] | np.ndarray | int, multiple: int) -> np.ndarray:
    """int64: how many tokens of a row samples of these lengths take up, each a multiple of `multiple`."""
    return -(-np.asarray(lengths, dtype=np.int64) // multiple) * multiple


def pack(lengths: Sequence[int] | np.ndarray, seq_length: int, packed: bool) -> list[Bin]:
    """Indices of the samples in each bin: first fit by falling length (ties in order); or one sample a bin.

    Raises:
        ValueError: a sample longer than `seq_length`.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and sizes.max() > seq_length:
        raise ValueError(f"a sample of {sizes.max()} tokens does not fit in rows of {seq_length}")
    if not packed:
        return [[i] for i in range(len(sizes))]
    bins: list[Bin] = []
    room: list[int] = []
    for i in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[i])
        place = next((b for b, free in enumerate(room) if free >= size), None)
        if place is None:
            place = len(bins)
            bins.append([])
            room.append(seq_length)
        bins[place].append(i)
        room[place] -= size
    return bins


def deal(
    bins: Sequence[Bin],
    lengths: Sequence[int] | np.ndarray,
    dp_size: int,
    micro_batch_size: int,
    multiple: int = 1,
) -> list[list[list[Bin]]]:
    """[dp rank][micro-batch] -> `micro_batch_size` bins; every rank gets the same number of micro-batches.

    That number is a multiple of `multiple`. The bins are filled up with empty ones to make it so, and dealt to and fro
    by falling attention work (sum of squared lengths), so that ranks have about equal work at about the same time.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    step = dp_size * micro_batch_size * multiple
    filled = [*bins, *([] for _ in range(-len(bins) % step))]
    work = np.array([int((sizes[b] ** 2).sum()) if b else 0 for b in filled], dtype=np.int64)
    order = np.argsort(-work, kind="stable").tolist()
    hands: list[list[Bin]] = [[] for _ in range(dp_size)]
    for turn in range(0, len(order), dp_size):
        dealt = order[turn : turn + dp_size]
        ranks = range(dp_size) if (turn // dp_size) % 2 == 0 else range(dp_size - 1, -1, -1)
        for rank, b in zip(ranks, dealt, strict=True):
            hands[rank].append(filled[b])
    return [[hand[i : i + micro_batch_size] for i in range(0, len(hand), micro_batch_size)] for hand in hands]


def micro_batch_tokens(
    hand: Sequence[Sequence[Bin]], lengths: Sequence[int] | np.ndarray, unit: int, alike: bool
) -> list[int]:
    """T of each micro-batch of one rank: its samples' tokens, rounded up to a multiple of `unit`, at least one.

    `alike`: all get the largest, as pipeline stages must send each other tensors of one size throughout a step.
    """
    contents = [sum(int(lengths[i]) for b in bins for i in b) for bins in hand]
    tokens: list[int] = padded(np.maximum(contents, 1), unit).tolist()
    return [max(tokens)] * len(tokens) if alike else tokens


def collate(
    rows: Sequence[Sequence[Sample]],
    fields: Callable[[Sample], Mapping[str, np.ndarray]],
    num_tokens: int,
    pad_id: int,
    like: Mapping[str, np.ndarray],
    multiple: int = 1,
) -> dict[str, Any]:
    """One micro-batch: the samples of its rows one after the other, then padding up to T = `num_tokens`.

    Args:
        rows: the samples of each of its bins.
        fields: an objective's `sample_fields`: arrays [P, ...] of a sample, one entry a supervised position.
        like: the same fields of any sample: gives shapes and types where a micro-batch has no sample.
        multiple: of which each sample's segment is.

    Returns:
        tokens, position_ids int64 [1, T] (positions restart at each segment); cu_seqlens int32 [segments + 1]; bounds,
        the same as a tuple; max_seqlen int, the longest segment; positions int64 [N], indices into T whose next token
        is supervised; labels int64 [N], those next tokens; sequences int64 [N], the sample that each belongs to;
        sequence_tokens int64 [S], how many each sample has; keys, the samples' keys in order; and the fields, [N, ...].

    Raises:
        ValueError: the samples do not fit; a field has not one entry a supervised position.
    """
    tokens = np.full(num_tokens, pad_id, dtype=np.int64)
    bounds = [0]
    samples = [sample for row in rows for sample in row]
    positions: list[np.ndarray] = []
    for sample in samples:
        place, end = bounds[-1], bounds[-1] + int(padded(len(sample.ids), multiple))
        if end > num_tokens:
            raise ValueError(f"{sample.source}: the samples of a micro-batch exceed {num_tokens} tokens")
        tokens[place : place + len(sample.ids)] = sample.ids
        positions.append(place + sample.positions)
        bounds.append(end)
    if bounds[-1] < num_tokens:
        bounds.append(num_tokens)
    segments = np.diff(bounds)
    where = np.concatenate(positions) if positions else np.empty(0, dtype=np.int64)
    counts = np.array([len(part) for part in positions], dtype=np.int64)
    batch: dict[str, Any] = {
        "tokens": torch.from_numpy(tokens)[None],
        "position_ids": torch.from_numpy(np.arange(len(tokens)) - np.repeat(bounds[:-1], segments))[None],
        "cu_seqlens": torch.tensor(bounds, dtype=torch.int32),
        "bounds": tuple(bounds),
        "max_seqlen": int(segments.max()),
        "positions": torch.from_numpy(where),
        "labels": torch.from_numpy(tokens[where + 1]),
        "sequences": torch.from_numpy(np.repeat(np.arange(len(samples)), counts)),
        "sequence_tokens": torch.from_numpy(counts),
        "keys": [sample.key for sample in samples],
    }
    collected = [fields(sample) for sample in samples]
    for name, array in like.items():
        parts = [own[name] for own in collected] or [np.asarray(array)[:0]]
        batch[name] = torch.from_numpy(np.concatenate(parts))
        if len(batch[name]) != len(where):
            raise ValueError(f"field {name!r} has {len(batch[name])} entries for {len(where)} supervised positions")
    return batch


def context_part(batch: Mapping[str, Any], fields: Iterable[str], rank: int, size: int) -> dict[str, Any]:
    """What context-parallel rank `rank` of `size` takes of a micro-batch: its tokens, and the positions among them.

    Args:
        batch: from `collate`, with segments that are multiples of 2 x size.
        fields: names of the objective's fields.

    Returns:
        the batch with tokens and position_ids [1, R], in zigzag order; positions [M], indices into R; labels,
        sequences and the fields of those, [M, ...]; kept int64 [M], which of the N positions they are; num_positions,
        which is N. cu_seqlens, bounds, max_seqlen, sequence_tokens and keys stay those of the whole micro-batch.
    """
    mine = zigzag(batch["cu_seqlens"], rank, size)
    place = torch.full((batch["tokens"].size(1),), -1, dtype=torch.int64)
    place[mine] = torch.arange(len(mine))
    positions = place[batch["positions"]]
    kept = (positions >= 0).nonzero().flatten()
    part = {name: batch[name][:, mine] for name in ("tokens", "position_ids")}
    part |= {name: batch[name][kept] for name in ("labels", "sequences", *fields)}
    return {**batch, **part, "positions": positions[kept], "kept": kept, "num_positions": len(batch["positions"])}
