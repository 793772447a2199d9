"""The largest elements of a tensor, exactly, in passes over blocks: what a stable sort would put first.

Keys are non-negative fp32, so their bit patterns, read as integers, are in the same order. Pass 1 counts the upper 15
bits of every key, which finds the interval that holds the k-th largest. Pass 2 counts each value in that interval,
block by block, which finds the k-th largest itself and, for each block, how many of its elements that equal it are
taken: the first ones, in the order of the flat tensor. Where an interval is so full that the values of pass 2 might
not fit (more than `MAX_MEMBERS`), one more pass counts the lower 17 bits first.

Only integers are added, so block sizes and threads change nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fusemega.merge.method import Block, Pass

_LOW_BITS = 17
_COARSE_BINS = 1 << (31 - _LOW_BITS)  # no sign bit
_FINE_BINS = 1 << _LOW_BITS
MAX_MEMBERS = 1 << 22
PASS_NAMES = ("counts of the keys' upper 15 bits", "the threshold and its ties")


@dataclass(frozen=True)
class Selection:
    """The k largest of one stream of keys.

    Attributes:
        count: k.
        threshold: the smallest key taken; infinite where k is 0.
        ties: for each block, how many of the keys that equal the threshold are taken, and how many there are.
    """

    count: int
    threshold: float
    ties: list[tuple[int, int]]

    def mask(self, block: Block, keys_n: torch.Tensor) -> torch.Tensor:
        """1.0 for the elements taken and 0.0 for the others, fp32 [n]."""
        taken, there = self.ties[block.index] if self.ties else (0, 0)
        out = torch.empty_like(keys_n, dtype=torch.float32)
        if taken == there:
            return torch.ge(keys_n, self.threshold, out=out)
        torch.gt(keys_n, self.threshold, out=out)
        out.numpy()[np.flatnonzero(keys_n.numpy() == np.float32(self.threshold))[:taken]] = 1.0
        return out


def select_largest(
    keys: Callable[[Block], list[torch.Tensor]], count_of: Callable[[int], list[int]]
) -> Generator[Pass, list[Any], list[Selection]]:
    """The largest elements of several streams of keys over one job.

    Args:
        keys: block -> keys of each stream, non-negative fp32 [n]; called again in every pass.
        count_of: how many elements of the first stream are not zero -> how many are wanted of each stream. No more than
            there are elements.
    """
    histograms = _Histograms(keys)
    nonzero = sum((yield histograms.add))
    counts = count_of(nonzero)
    # Inclusive intervals of bit patterns that hold each stream's k-th largest key, and how many keys lie above.
    intervals = [_locate(histogram, k) for histogram, k in zip(histograms.counts, counts, strict=True)]
    lows = [bin_ << _LOW_BITS for bin_, _, _ in intervals]
    highs = [low + _FINE_BINS - 1 for low in lows]
    above = [higher for _, higher, _ in intervals]
    if max(members for _, _, members in intervals) > MAX_MEMBERS:
        fine = _Histograms(keys, lows)
        yield fine.add
        found = [_locate(histogram, k - a) for histogram, k, a in zip(fine.counts, counts, above, strict=True)]
        lows = highs = [low + offset for low, (offset, _, _) in zip(lows, found, strict=True)]
        above = [a + higher for a, (_, higher, _) in zip(above, found, strict=True)]
    members = yield lambda block: [
        _members(key, low, high) for key, low, high in zip(keys(block), lows, highs, strict=True)
    ]
    return [
        _settle([part[stream] for part in members], counts[stream], above[stream]) for stream in range(len(counts))
    ]


class _Histograms:
    """Counts of each stream's upper bits over all blocks, or of the lower bits in the intervals from `lows` on."""

    def __init__(self, keys: Callable[[Block], list[torch.Tensor]], lows: list[int] | None = None) -> None:
        self.keys, self.lows = keys, lows
        self.counts: list[np.ndarray] = []
        self._lock = threading.Lock()

    def add(self, block: Block) -> int:
        """Returns how many keys of the first stream are not zero."""
        streams = self.keys(block)
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
        return int(torch.count_nonzero(streams[0]))


def _locate(histogram: np.ndarray, k: int) -> tuple[int, int, int]:
    """(bin of the k-th largest, how many lie in higher bins, how many lie in it); the highest bin where k is 0."""
    from_top = np.cumsum(histogram[::-1])
    at = int(np.searchsorted(from_top, k)) if k else 0
    bin_ = len(histogram) - 1 - at
    members = int(histogram[bin_])
    return bin_, int(from_top[at]) - members, members


def _members(key: torch.Tensor, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """Bit patterns in [low, high], ascending, and how often each occurs."""
    bits = key.view(torch.int32).numpy()
    inside = bits[np.flatnonzero((bits >= low) & (bits <= high))]
    return np.unique(inside, return_counts=True)


def _settle(parts: list[tuple[np.ndarray, np.ndarray]], k: int, above: int) -> Selection:
    if k == 0:
        return Selection(0, float("inf"), [])
    values, inverse = np.unique(np.concatenate([values for values, _ in parts]), return_inverse=True)
    counts = np.zeros(len(values), np.int64)
    np.add.at(counts, inverse, np.concatenate([counts for _, counts in parts]))
    at, higher, _ = _locate(counts, k - above)
    left = k - above - higher
    ties = []
    for block_values, block_counts in parts:
        there = int(block_counts[block_values == values[at]].sum())
        ties.append((min(left, there), there))
        left -= ties[-1][0]
    return Selection(k, float(values[at : at + 1].astype(np.int32).view(np.float32)[0]), ties)
