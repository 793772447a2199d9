"""Selects the largest elements of a tensor exactly, in passes over blocks: those that a stable sort would put first.

A sample of the tensor gives a bracket: two keys between which the k-th largest almost certainly lies. One pass counts
the keys above the bracket and keeps those inside it, block by block. This gives the k-th largest key, and for each
block how many of the elements equal to it are taken: the first ones in the order of the flat tensor. If the sample
misses, one more pass counts the upper 15 bits of every key (keys are non-negative fp32, so their bit patterns have the
same order), and the bracket becomes the interval that holds the k-th largest. If that interval has more than
`MAX_MEMBERS` keys, another pass counts the lower 17 bits.

Only integers are added, and the sample does not depend on the blocks, so the result does not depend on their size.

Shape suffixes: n elements of one block, flat, m places in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from fusemega.merge.method import ELEMENTWISE_ALIGNMENT, Block, Job, PartialPass, Pass, PassesFor
from fusemega.merge.statistics import CELL

_LOW_BITS = 17  # counted last, and only within one interval: all 31 at once would be 2^31 counters
_COARSE_BINS = 1 << (31 - _LOW_BITS)  # no sign bit
_FINE_BINS = 1 << _LOW_BITS
_PIECE = 1 << 13  # elements in a part that is sampled
_PIECES = (8, 128)  # the fewest and the most parts
_SURE = 8.0
"""Standard errors of a sample of independent elements on either side of the bracket. A tensor's neighbours are alike,
so its elements are not independent."""
_FEW = 4  # up to so many distinct values in a bracket are counted by comparison, without a sort
_SMALLEST = float(np.finfo(np.float32).smallest_subnormal)  # the smallest key that is not zero
MAX_MEMBERS = 1 << 22
PASS_NAMES = ("the threshold and its ties",)


@dataclass(frozen=True)
class Keys:
    """Streams of keys to rank elements by: non-negative fp32.

    Attributes:
        rough: block -> each stream's keys [n], with a relative error of at most `slack`, and zero where the true ones
            are; one stream after the other, so that only one needs room.
        exact: (block, stream, places [m]) -> the true keys there [m], fp32.
        slack: 0 where `rough` is exact.
    """

    rough: Callable[[Block], Iterator[torch.Tensor]]
    exact: Callable[[Block, int, np.ndarray], np.ndarray] | None = None
    slack: float = 0.0


@dataclass
class _Marks:
    """Which elements of a block are certainly taken, and which others may be (None: no others), one bit for each."""

    taken: np.ndarray
    open: np.ndarray | None


@dataclass(frozen=True)
class Selection:
    """The k largest of one stream of keys.

    Attributes:
        count: k.
        threshold: the smallest key taken; infinite where k is 0.
        ties: for each block, how many of the keys that equal the threshold are taken, and how many there are.
        marks: marks of each block, if there are `Keys.exact`.
    """

    keys: Keys
    stream: int
    count: int
    threshold: float
    ties: list[tuple[int, int]]
    marks: list[_Marks]

    def places(self, block: Block) -> np.ndarray:
        """The places of the elements taken, in ascending order. Needs `Keys.exact`.

        They are remembered, for a block that is asked for again.
        """
        marks = self.marks[block.index]
        length = len(block.stored[0])
        taken = np.unpackbits(marks.taken, count=length).view(bool)
        if marks.open is not None:
            assert self.keys.exact is not None
            places = np.flatnonzero(np.unpackbits(marks.open, count=length).view(bool))
            keys = self.keys.exact(block, self.stream, places)
            taken[places[keys > self.threshold]] = True
            if self.ties:
                taken[places[keys == self.threshold][: self.ties[block.index][0]]] = True
            marks.taken, marks.open = np.packbits(taken), None
        return np.flatnonzero(taken)

    def trim(self, block: Block, values_n: torch.Tensor) -> torch.Tensor:
        """`values_n`, whose magnitudes are the keys, with zero in place of those not taken; it may be overwritten."""
        taken, there = self.ties[block.index] if self.ties else (0, 0)
        if values_n.dtype == torch.float32:
            # `hardshrink` keeps what lies beyond the bound; one step below the threshold, it keeps the ties too.
            bound = np.nextafter(np.float32(self.threshold), np.float32(0)) if taken else self.threshold
            kept = torch.nn.functional.hardshrink(values_n, float(bound))
            if 0 < taken < there:
                kept.numpy()[np.flatnonzero(values_n.abs_().numpy() == self.threshold)[taken:]] = 0
            return kept
        keys = values_n.abs().float().numpy()
        values_n.numpy()[keys < self.threshold] = 0
        values_n.numpy()[np.flatnonzero(keys == self.threshold)[taken:]] = 0
        return values_n


@dataclass(frozen=True)
class _Scanned:
    """One stream of one block: how many keys there are, are not zero, and lie above the bracket; and the values within
    it, without zero, with how often each occurs."""

    elements: int
    nonzero: int
    above: int
    values: np.ndarray
    counts: np.ndarray
    marks: _Marks | None


def select_largest(job: Job, keys: Keys, count_of: Callable[[int], list[int]]) -> PassesFor[list[Selection]]:
    """The largest elements of several streams of keys over a job of one tensor.

    Args:
        job: the job.
        keys: keys of its blocks; computed again in every pass.
        count_of: number of elements of the first stream that are not zero -> number wanted of each stream: at most all
            elements, or with `Keys.exact` at most those that are not zero.
    """
    (tensor,) = job.tensors
    sampled = yield PartialPass(lambda block: [key.numpy() for key in keys.rough(block)], _pieces(tensor.elements))
    brackets = _guess(sampled, tensor.elements, count_of, keys.slack)
    if brackets is not None:
        found = _settle((yield _scan(keys, brackets)), keys, brackets, count_of)
        if found is not None:
            return found
    brackets = yield from _count(keys, count_of)
    found = _settle((yield _scan(keys, brackets)), keys, brackets, count_of)
    assert found is not None
    return found


def _pieces(elements: int) -> list[tuple[int, int]]:
    """(start, count) of each part of a tensor that is sampled: a sixteenth, or all of a small one."""
    fewest, most = _PIECES
    number = min(max(elements // (16 * _PIECE), fewest), most)
    if elements <= 2 * number * _PIECE:
        return [(0, elements)]
    step = elements // number // ELEMENTWISE_ALIGNMENT * ELEMENTWISE_ALIGNMENT
    return [(place * step, _PIECE) for place in range(number)]


def selection_bytes(elements: int, streams: int) -> int:
    """Memory of a selection over a tensor: the sample and one stream's sorted copy; the values within the widest
    brackets, and how often they occur."""
    size = sum(count for _, count in _pieces(elements))
    within = min(MAX_MEMBERS, int(_SURE / math.sqrt(size) * elements))
    return 4 * size * (streams + 1) + 8 * within * streams


@dataclass(frozen=True)
class _Bracket:
    """Keys from `low` to `high`, both included; and all values that a sample has there, if they are few."""

    low: float
    high: float
    values: tuple[float, ...] = ()


def _guess(
    sampled: list[list[np.ndarray]], elements: int, count_of: Callable[[int], list[int]], slack: float
) -> list[_Bracket] | None:
    """The brackets from a sample, which has one array for each stream of each block; None if more keys may lie within
    them than are to be remembered."""
    size = sum(len(streams[0]) for streams in sampled)
    nonzero = sum(_nonzero(streams[0]) for streams in sampled)
    out = []
    for parts, k in zip(zip(*sampled, strict=True), count_of(round(nonzero / size * elements)), strict=True):
        sample = np.concatenate(parts)
        sample.sort()
        rank = k / elements * size  # of the k-th largest in the sample, from the top
        margin = 1.0 if size == elements else _SURE * (math.sqrt(rank * (1 - rank / size)) + 1)
        first, last = math.floor(size - rank - margin), math.ceil(size - rank + margin)
        low = float(sample[first]) * (1 - slack) if first >= 0 else 0.0
        high = float(sample[last]) * (1 + slack) if last < size else math.inf
        within = sample[np.searchsorted(sample, max(low, _SMALLEST)) : np.searchsorted(sample, high, "right")]
        values = within[np.flatnonzero(np.diff(within, prepend=np.float32(-1)))]
        # A block stores each value once, so few distinct values give few members, however often they occur.
        if min(len(within) / size * elements, len(values) * (1 + elements / CELL)) > MAX_MEMBERS:
            return None
        out.append(_Bracket(low, high, tuple(values.tolist()) if len(values) <= _FEW and not slack else ()))
    return out


def _count(keys: Keys, count_of: Callable[[int], list[int]]) -> PassesFor[list[_Bracket]]:
    """The brackets from the bit patterns of all keys."""
    histograms = _Histograms(keys)
    counts = count_of(sum((yield histograms.add)))
    found = [_locate(histogram, k) for histogram, k in zip(histograms.counts, counts, strict=True)]
    lows = [bin_ << _LOW_BITS for bin_, _, _ in found]
    highs = [low + _FINE_BINS - 1 for low in lows]
    if max(members for _, _, members in found) > MAX_MEMBERS:
        fine = _Histograms(keys, lows)
        yield fine.add
        offsets = [
            _locate(histogram, k - above)[0]
            for histogram, k, (_, above, _) in zip(fine.counts, counts, found, strict=True)
        ]
        lows = highs = [low + offset for low, offset in zip(lows, offsets, strict=True)]
    return [
        _Bracket(_float(low) * (1 - keys.slack), _float(high) * (1 + keys.slack))
        for low, high in zip(lows, highs, strict=True)
    ]


class _Histograms:
    """Counts of each stream's upper bits over all blocks, or of the lower bits in the intervals from `lows` on."""

    def __init__(self, keys: Keys, lows: list[int] | None = None) -> None:
        self.keys, self.lows = keys, lows
        self.counts: list[np.ndarray] = []

    def add(self, block: Block) -> int:
        """Returns how many keys of the first stream are not zero."""
        parts = []
        nonzero = 0
        for stream, key in enumerate(self.keys.rough(block)):
            nonzero = nonzero if stream else _nonzero(key.numpy())
            bits = key.view(torch.int32)
            if self.lows is None:
                parts.append(torch.bincount(bits >> _LOW_BITS, minlength=_COARSE_BINS).numpy())
            else:
                inside = bits[(bits >> _LOW_BITS) == self.lows[stream] >> _LOW_BITS]
                parts.append(torch.bincount(inside - self.lows[stream], minlength=_FINE_BINS).numpy())
        if not self.counts:
            self.counts = [np.zeros_like(part) for part in parts]
        for total, part in zip(self.counts, parts, strict=True):
            total += part
        return nonzero


def _locate(histogram: np.ndarray, k: int) -> tuple[int, int, int]:
    """(bin of the k-th largest, how many lie in higher bins, how many lie in it); the highest bin where k is 0."""
    from_top = np.cumsum(histogram[::-1])
    at = int(np.searchsorted(from_top, k)) if k else 0
    bin_ = len(histogram) - 1 - at
    members = int(histogram[bin_])
    return bin_, int(from_top[at]) - members, members


def _float(bits: int) -> float:
    return float(np.array(bits, np.int32).view(np.float32))


def _scan(keys: Keys, brackets: list[_Bracket]) -> Pass:
    def scan(block: Block) -> list[_Scanned]:
        return [
            _scan_one(keys, block, stream, rough_n.numpy(), bracket)
            for stream, (rough_n, bracket) in enumerate(zip(keys.rough(block), brackets, strict=True))
        ]

    return scan


def _scan_one(keys: Keys, block: Block, stream: int, rough: np.ndarray, bracket: _Bracket) -> _Scanned:
    low, high = max(bracket.low, _SMALLEST), bracket.high
    # Only keys beyond the bracket by more than their error are decided by their rough value.
    above, below = rough > high * (1 + keys.slack), rough < low * (1 - keys.slack)
    number = np.count_nonzero(above)
    left = len(rough) - number - np.count_nonzero(below)
    values = np.array(bracket.values, np.float32)
    counts = np.array([np.count_nonzero(rough == value) for value in values], np.int32)
    marks = None if keys.exact is None else _Marks(np.packbits(above), None)
    if left > counts.sum():  # other values than those of the sample
        within = np.logical_not(np.logical_or(above, below))
        places = np.flatnonzero(within)
        true = rough.take(places) if keys.exact is None else keys.exact(block, stream, places)
        number += np.count_nonzero(true > high)
        values, often = np.unique(true[(true >= low) & (true <= high)], return_counts=True)
        counts = often.astype(np.int32)
        if marks:
            marks.open = np.packbits(within)
    # Nonzero keys are counted in the first stream, and where zeros may be selected.
    nonzero = _nonzero(rough) if stream == 0 or bracket.low == 0 else 0
    return _Scanned(len(rough), nonzero, int(number), values, counts, marks)


def _nonzero(keys_n: np.ndarray) -> int:
    return int(np.count_nonzero(keys_n > 0))  # keys are not negative; to count the floats takes six times as long


def _settle(
    parts: list[list[_Scanned]], keys: Keys, brackets: list[_Bracket], count_of: Callable[[int], list[int]]
) -> list[Selection] | None:
    """The selections from the scan of all blocks; None if a k-th largest key does not lie in its bracket."""
    counts = count_of(sum(streams[0].nonzero for streams in parts))
    out = []
    for stream, (k, bracket) in enumerate(zip(counts, brackets, strict=True)):
        blocks = [streams[stream] for streams in parts]
        left = k - sum(block.above for block in blocks)
        marks = [block.marks for block in blocks if block.marks]
        within = sum(int(block.counts.sum()) for block in blocks)
        if k == 0:
            out.append(Selection(keys, stream, 0, math.inf, [], marks))
            continue
        if left <= 0 or (left > within and bracket.low > 0):
            return None
        # With fewer nonzero keys than wanted the threshold is 0, and the zeros are its ties.
        threshold = 0.0
        there = [block.elements - block.nonzero for block in blocks]
        if left <= within:
            values = np.concatenate([block.values for block in blocks])
            order = np.argsort(values)[::-1]
            numbers = np.cumsum(np.concatenate([block.counts for block in blocks])[order])
            threshold = float(values[order[np.searchsorted(numbers, left)]])
            there = [int(block.counts[block.values == threshold].sum()) for block in blocks]
            within = sum(int(block.counts[block.values > threshold].sum()) for block in blocks)
        left -= within
        ties = []
        for number in there:
            ties.append((min(left, number), number))
            left -= ties[-1][0]
        out.append(Selection(keys, stream, k, threshold, ties, marks))
    return out
