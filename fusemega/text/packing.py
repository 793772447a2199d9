"""A global batch of samples (or groups) -> bins (rows of seq_length tokens) -> micro-batches of data-parallel ranks.

Everything is a deterministic function of the samples' lengths, and the samples of a global batch are the same
whatever the layout, the micro-batch size, and whether rows are packed. Attention never crosses a sample: each is a
segment of its own, and so is the padding at the end of a micro-batch. Context parallelism splits every segment, so
there each sample is padded to a multiple of 2 CP tokens, inside its segment.

Shape suffixes: T tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Bin = list[int]


def padded(lengths: Sequence[int] | np.ndarray | int, multiple: int) -> np.ndarray:
    """int64: how many tokens of a row samples of these lengths take up, each a multiple of `multiple`."""
    return -(-np.asarray(lengths, dtype=np.int64) // multiple) * multiple


def shared_beginning(ids: Sequence[np.ndarray]) -> int:
    """How many tokens all of several sequences begin with; each keeps at least one token of its own.

    >>> shared_beginning([np.array([5, 6, 7, 1]), np.array([5, 6, 8])]), shared_beginning([np.array([5, 6])])
    (2, 0)
    """
    if len(ids) < 2:
        return 0
    shared = min(map(len, ids)) - 1
    for other in ids[1:]:
        differs = np.flatnonzero(ids[0][:shared] != other[:shared])
        shared = int(differs[0]) if len(differs) else shared
    return shared


def room(
    lengths: np.ndarray, sizes: Sequence[int] | np.ndarray, shared: Sequence[int] | np.ndarray, multiple: int
) -> tuple[np.ndarray, np.ndarray]:
    """For each group: how many tokens of a row it takes up, and its attention's work (squared lengths), int64 both.

    Args:
        lengths: int64, of the samples, group by group.
        sizes: samples of each group.
        shared: tokens that each group's samples begin with and that lie in the row once; 0 for none.
        multiple: what each segment of a row is padded to.
    """
    starts, shared = np.cumsum([0, *sizes])[:-1], np.asarray(shared, dtype=np.int64)
    each = np.repeat(shared, sizes)
    places = np.add.reduceat(padded(lengths - each, multiple), starts) + padded(shared, multiple)
    return places, np.add.reduceat(lengths**2 - each**2, starts) + shared**2


def pack(lengths: Sequence[int] | np.ndarray, seq_length: int, packed: bool) -> list[Bin]:
    """Indices of the samples in each bin: first fit by falling length (ties in order); or one sample a bin.

    Groups are packed whole, as samples of their total length.

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
    work: Sequence[int] | np.ndarray,
    dp_size: int,
    micro_batch_size: int,
    multiple: int = 1,
) -> list[list[list[Bin]]]:
    """[dp rank][micro-batch] -> `micro_batch_size` bins; every rank gets the same number of micro-batches.

    That number is a multiple of `multiple`. The bins are filled up with empty ones to make it so, and dealt to and fro
    by falling attention work, so that ranks have about equal work at about the same time.

    Args:
        work: squared length of each sample; for a group, the sum of its samples' squared lengths.
    """
    costs = np.asarray(work, dtype=np.int64)
    step = dp_size * micro_batch_size * multiple
    filled = [*bins, *([] for _ in range(-len(bins) % step))]
    sums = np.array([int(costs[b].sum()) if b else 0 for b in filled], dtype=np.int64)
    order = np.argsort(-sums, kind="stable").tolist()
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
