"""Sparse counts of pairs of ids; equal pairs are added up while they are read.

Shape suffixes: C pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

_MERGE = 1 << 22  # pairs in memory before equal ones are added up


@dataclass(frozen=True)
class PairCounts:
    """Pairs and how often each comes: `source_C`, `target_C`, `count_C`, int64. From `merged` they are distinct, by
    source id, then target id."""

    source_C: np.ndarray
    target_C: np.ndarray
    count_C: np.ndarray


def merged(parts: Iterable[PairCounts]) -> PairCounts:
    """One list of distinct pairs; memory grows with their number, not with the corpus.

    >>> part = PairCounts(np.array([5, 5]), np.array([1, 2]), np.array([1, 1]))
    >>> total = merged([part, part, PairCounts(np.array([5]), np.array([2]), np.array([4]))])
    >>> list(zip(total.source_C.tolist(), total.target_C.tolist(), total.count_C.tolist()))
    [(5, 1, 2), (5, 2, 6)]
    """
    waiting: list[PairCounts] = []
    size, limit = 0, _MERGE
    for part in parts:
        waiting.append(part)
        size += len(part.count_C)
        if size > limit:
            waiting = [_sum(waiting)]
            size = len(waiting[0].count_C)
            limit = max(_MERGE, 2 * size)  # otherwise, many distinct pairs would be sorted again after every part
    return _sum(waiting)


def _sum(parts: Sequence[PairCounts]) -> PairCounts:
    source_C, target_C, count_C = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("source_C", "target_C", "count_C")
    )
    keys, place = np.unique((source_C << 32) | target_C, return_inverse=True)
    counts = np.bincount(place, weights=count_C, minlength=len(keys)).astype(np.int64)
    return PairCounts(keys >> 32, keys & 0xFFFFFFFF, counts)
