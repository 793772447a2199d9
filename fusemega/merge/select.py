"""The largest elements of a tensor, exactly, in passes over blocks: what a stable sort would put first.

A sample of the tensor gives a bracket, two keys between which the k-th largest almost certainly lies. One pass then
counts the keys above the bracket and keeps those within it, block by block, which finds the k-th largest itself and,
for each block, how many of its elements that equal it are taken: the first ones, in the order of the flat tensor. Where
the sample was misleading, a pass counts the upper 15 bits of every key (they are non-negative fp32, so their bit
patterns are in the same order), and the bracket is the interval that holds the k-th largest; where that is so full that
its keys might not fit (more than `MAX_MEMBERS`), one more pass counts the lower 17 bits.

Only integers are added, and the sample does not depend on blocks, so block sizes and threads change nothing.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fusemega.merge.method import ELEMENTWISE_ALIGNMENT, Block, Job, Pass, Sample

_LOW_BITS = 17
_COARSE_BINS = 1 << (31 - _LOW_BITS)  # no sign bit
_FINE_BINS = 1 << _LOW_BITS
_PIECE = 1 << 13
_PIECES = (16, 128)
_SURE = 8.0
"""Standard errors of a sample of independent elements on either side of the bracket. A tensor's neighbours are alike,
so its elements are not independent."""
_SMALLEST = float(np.finfo(np.float32).smallest_subnormal)
MAX_MEMBERS = 1 << 22
PASS_NAMES = ("the threshold and its ties",)


@dataclass(frozen=True)
class Keys:
    """Streams of keys to rank elements by: non-negative fp32.

    Attributes:
        rough: block -> each stream's keys [n], relatively within `slack` of the true ones, and zero where those are.
        exact: (block, stream, places [m]) -> the true keys there [m], fp32.
        slack: 0 where `rough` is exact.
    """

    rough: Callable[[Block], list[torch.Tensor]]
    exact: Callable[[Block, int, np.ndarray], np.ndarray] | None = None
    slack: float = 0.0

    def near(self, block: Block, stream: int, rough: np.ndarray, low: float, high: float) -> tuple[np.ndarray, ...]:
        """(places of the keys that may lie in [low, high], the true keys there): all others are surely outside."""
        inside = np.logical_and(rough >= low * (1 - self.slack), rough <= high * (1 + self.slack))
        places = np.flatnonzero(inside)
        return places, rough[places] if self.exact is None else self.exact(block, stream, places)


@dataclass(frozen=True)
class Selection:
    """The k largest of one stream of keys.

    Attributes:
        keys: what is ranked.
        stream: its number among them.
        count: k.
        threshold: the smallest key taken; infinite where k is 0.
        ties: for each block, how many of the keys that equal the threshold are taken, and how many there are.
    """

    keys: Keys
    stream: int
    count: int
    threshold: float
    ties: list[tuple[int, int]]

    def mask(self, block: Block, rough_n: torch.Tensor) -> torch.Tensor:
        """1.0 for the elements taken and 0.0 for the others, fp32 [n]; from the stream's rough keys."""
        taken, there = self.ties[block.index] if self.ties else (0, 0)
        out = torch.empty_like(rough_n, dtype=torch.float32)
        if self.keys.slack == 0 and taken in (0, there):
            compare = torch.ge if taken else torch.gt
            return compare(rough_n, self.threshold, out=out)
        torch.gt(rough_n, self.threshold * (1 + self.keys.slack), out=out)
        places, keys = self.keys.near(block, self.stream, rough_n.numpy(), self.threshold, self.threshold)
        out.numpy()[places[keys > self.threshold]] = 1.0
        out.numpy()[places[keys == self.threshold][:taken]] = 1.0
        return out


@dataclass(frozen=True)
class _Scanned:
    """One stream of one block: how many keys there are, are not zero, and lie above the bracket; and the values within
    it, without zero, with how often each occurs (a value may be there several times)."""

    elements: int
    nonzero: int
    above: int
    values: np.ndarray
    counts: np.ndarray


def select_largest(
    job: Job, keys: Keys, count_of: Callable[[int], list[int]]
) -> Generator[Pass | Sample, list[Any], list[Selection]]:
    """The largest elements of several streams of keys over a job of one tensor.

    Args:
        job: the job.
        keys: of its blocks; computed again in every pass.
        count_of: how many elements of the first stream are not zero -> how many are wanted of each stream. No more than
            there are elements.
    """
    (tensor,) = job.tensors
    sampled = yield Sample(lambda block: [key.numpy() for key in keys.rough(block)], _pieces(tensor.elements))
    samples = [np.concatenate(parts) for parts in zip(*sampled, strict=True)]
    brackets = _guess(samples, tensor.elements, count_of, keys.slack)
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
        return [(start, min(_PIECE, elements - start)) for start in range(0, elements, _PIECE)]
    step = elements // number // ELEMENTWISE_ALIGNMENT * ELEMENTWISE_ALIGNMENT
    return [(place * step, _PIECE) for place in range(number)]


Brackets = list[tuple[float, float]]
"""(low, high) of each stream, both within."""


def _guess(
    samples: list[np.ndarray], elements: int, count_of: Callable[[int], list[int]], slack: float
) -> Brackets | None:
    """From a sample; None where more keys may lie within than are to be remembered."""
    size = len(samples[0])
    nonzero = round(np.count_nonzero(samples[0]) / size * elements)
    out = []
    for sample, k in zip(samples, count_of(nonzero), strict=True):
        rank = k / elements * size  # of the k-th largest in the sample, from the top
        margin = 1.0 if size == elements else _SURE * (math.sqrt(rank * (1 - rank / size)) + 1)
        first, last = math.floor(size - rank - margin), math.ceil(size - rank + margin)
        sample = np.partition(sample, [min(max(place, 0), size - 1) for place in (first, last)])
        low = float(sample[first]) * (1 - slack) if first >= 0 else 0.0
        high = float(sample[last]) * (1 + slack) if last < size else math.inf
        if np.count_nonzero((sample >= max(low, _SMALLEST)) & (sample <= high)) / size * elements > MAX_MEMBERS:
            return None
        out.append((low, high))
    return out


def _count(keys: Keys, count_of: Callable[[int], list[int]]) -> Generator[Pass | Sample, list[Any], Brackets]:
    """From the bit patterns of all keys."""
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
        (_float(low) * (1 - keys.slack), _float(high) * (1 + keys.slack)) for low, high in zip(lows, highs, strict=True)
    ]


class _Histograms:
    """Counts of each stream's upper bits over all blocks, or of the lower bits in the intervals from `lows` on."""

    def __init__(self, keys: Keys, lows: list[int] | None = None) -> None:
        self.keys, self.lows = keys, lows
        self.counts: list[np.ndarray] = []
        self._lock = threading.Lock()

    def add(self, block: Block) -> int:
        """Returns how many keys of the first stream are not zero."""
        streams = self.keys.rough(block)
        parts = []
        for stream, key in enumerate(streams):
            bits = key.view(torch.int32)
            if self.lows is None:
                parts.append(torch.bincount(bits >> _LOW_BITS, minlength=_COARSE_BINS).numpy())
            else:
                inside = bits[(bits >> _LOW_BITS) == self.lows[stream] >> _LOW_BITS]
                parts.append(torch.bincount(inside - self.lows[stream], minlength=_FINE_BINS).numpy())
        with self._lock:
            if not self.counts:
                self.counts = [np.zeros_like(part) for part in parts]
            for total, part in zip(self.counts, parts, strict=True):
                total += part
        return int(np.count_nonzero(streams[0].numpy() > 0))


def _locate(histogram: np.ndarray, k: int) -> tuple[int, int, int]:
    """(bin of the k-th largest, how many lie in higher bins, how many lie in it); the highest bin where k is 0."""
    from_top = np.cumsum(histogram[::-1])
    at = int(np.searchsorted(from_top, k)) if k else 0
    bin_ = len(histogram) - 1 - at
    members = int(histogram[bin_])
    return bin_, int(from_top[at]) - members, members


def _float(bits: int) -> float:
    return float(np.array(bits, np.int32).view(np.float32))


def _scan(keys: Keys, brackets: Brackets) -> Pass:
    def scan(block: Block) -> list[_Scanned]:
        out = []
        for stream, (rough_n, (low, high)) in enumerate(zip(keys.rough(block), brackets, strict=True)):
            rough = rough_n.numpy()
            places, true = keys.near(block, stream, rough, max(low, _SMALLEST), high)
            above = np.count_nonzero(rough > high * (1 + keys.slack)) + np.count_nonzero(true > high)
            values = true[(true >= low) & (true <= high)]
            counts: np.ndarray = np.ones(len(values), np.int32)
            if len(values) > len(rough) // 8:  # many equal ones, which are to be remembered as one
                values, counts = np.unique(values, return_counts=True)
            out.append(_Scanned(len(rough), int(np.count_nonzero(rough > 0)), int(above), values, counts))
        return out

    return scan


def _settle(
    parts: list[list[_Scanned]], keys: Keys, brackets: Brackets, count_of: Callable[[int], list[int]]
) -> list[Selection] | None:
    """None where a k-th largest does not lie in its bracket."""
    counts = count_of(sum(streams[0].nonzero for streams in parts))
    out = []
    for stream, (k, (low, _)) in enumerate(zip(counts, brackets, strict=True)):
        blocks = [streams[stream] for streams in parts]
        left = k - sum(block.above for block in blocks)
        within = sum(int(block.counts.sum()) for block in blocks)
        if k == 0:
            out.append(Selection(keys, stream, 0, math.inf, []))
            continue
        if left <= 0 or (left > within and low > 0):
            return None
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
        out.append(Selection(keys, stream, k, threshold, ties))
    return out
