"""Normalised word n-grams of a text, as hashes; and near-duplicates and contaminated prompts by them.

A text is normalised (NFKC, case folded, punctuation left out); a word is a run of letters and digits, and each Chinese,
Japanese or Korean character is a word. A text of fewer than n words is one n-gram. Everything is exact up to a
collision of 64-bit hashes, and deterministic.
"""

from __future__ import annotations

import math
import re
import unicodedata
from array import array
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import xxhash

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(f"[{_CJK}]|[^\\W_{_CJK}]+")
_BASE = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xD6E8FEB86659FD93)
_SHIFT = np.uint64(32)


def words(text: str) -> list[str]:
    """The words of a text, normalised.

    >>> words("Héllo, ＷORLD! 你好 x_1")
    ['héllo', 'world', '你', '好', 'x', '1']
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


class Grams:
    """Makes the n-grams of texts.

    Args:
        n: words of an n-gram.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self._hashes: dict[str, int] = {}

    def __call__(self, text: str) -> np.ndarray:
        """uint64, sorted, each once: the n-grams of a text. A text without words is one n-gram of its characters."""
        found = words(text) or [text]
        known = self._hashes
        for word in found:
            if word not in known:
                known[word] = xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass"))
        hashes = np.fromiter((known[word] for word in found), dtype=np.uint64, count=len(found))
        length = min(self.n, len(hashes))
        grams = np.full(len(hashes) - length + 1, length, dtype=np.uint64)
        for i in range(length):
            grams = grams * _BASE + hashes[i : len(hashes) - length + 1 + i]
            grams = (grams ^ (grams >> _SHIFT)) * _MIX
        return np.unique(grams)


class Duplicate(NamedTuple):
    """Which kept prompt a removed one is like, by their numbers, and how much: the Jaccard index of their n-grams."""

    kept: int
    similarity: float


def near_duplicates(grams: Sequence[np.ndarray], threshold: float) -> dict[int, Duplicate]:
    """The texts that are near-duplicates of an earlier text that is kept.

    Two sets of sizes a and b with a Jaccard index of t or more share one of the first a - ceil(t a) + 1 elements of the
    first and one of so many of the second, in any common order; rare n-grams first makes candidates few (prefix
    filtering, Chaudhuri et al., 2006). Candidates are compared exactly.

    Args:
        grams: of each text, as `Grams` gives them, in the order in which texts are kept.
        threshold: Jaccard index from which on a text is a duplicate.

    Returns:
        Number of the removed text -> what it is like.
    """
    if not grams:
        return {}
    sizes = np.array([len(each) for each in grams])
    values, ids, counts = np.unique(np.concatenate(grams), return_inverse=True, return_counts=True)
    del values
    begins: dict[
        int, tuple[array[int], array[int]]
    ] = {}  # n-gram -> kept texts that begin with it, and its place there
    removed: dict[int, Duplicate] = {}
    start = 0
    for number, own in enumerate(grams):
        size = len(own)
        mine = ids[start : start + size]
        start += size
        prefix = size - math.ceil(threshold * size - 1e-9) + 1
        first = mine[np.lexsort((mine, counts[mine]))[:prefix]]
        shared = [(place, gram) for place, gram in enumerate(first.tolist()) if counts[gram] > 1]
        near: set[int] = set()
        for place, gram in shared:
            if gram in begins:
                near.update(_candidates(*begins[gram], place, size, sizes, threshold))
        found = None
        for other in sorted(near):
            both = len(np.intersect1d(own, grams[other], assume_unique=True))
            index = both / (size + len(grams[other]) - both)
            if index >= threshold - 1e-9 and (found is None or index > found.similarity):
                found = Duplicate(other, index)
        if found is not None:
            removed[number] = found
            continue
        for place, gram in shared:
            others, places = begins.setdefault(gram, (array("q"), array("q")))
            others.append(number)
            places.append(place)
    return removed


def _candidates(
    others: array[int], places: array[int], place: int, size: int, sizes: np.ndarray, threshold: float
) -> list[int]:
    """Of the texts that share an n-gram, those that can share enough if it is the first one that is shared: after it,
    each text has only so many left (the positional filter of PPJoin, Xiao et al., 2008). It leaves out prompts that
    share most of a template and no more.

    Args:
        others, places: the texts, and the n-gram's place in the order of each.
        place, size: its place in the text that is compared, and the size of that.
        sizes: of all texts.
    """
    numbers = np.frombuffer(others, dtype=np.int64)
    left = np.minimum(size - place, sizes[numbers] - np.frombuffer(places, dtype=np.int64))
    enough = threshold / (1 + threshold) * (size + sizes[numbers]) - 1e-9
    found: list[int] = numbers[left >= enough].tolist()
    return found


class Contamination(NamedTuple):
    """The text of a named set that a prompt contains, by its number, and the share of its n-grams that the prompt
    has."""

    text: int
    overlap: float


class Contaminants:
    """The texts of one or more named sets, such as a benchmark's questions.

    Args:
        texts: they.
        n: words of an n-gram.
        threshold: share of a text's n-grams from which on a prompt that has them is contaminated.
    """

    def __init__(self, texts: Sequence[str], n: int, threshold: float) -> None:
        self._grams = Grams(n)
        self._threshold = threshold
        sets = [self._grams(text) for text in texts]
        self._sizes = [len(each) for each in sets]
        numbers = np.repeat(np.arange(len(sets)), self._sizes)
        flat = np.concatenate(sets) if sets else np.zeros(0, dtype=np.uint64)
        order = np.argsort(flat, kind="stable")
        self._flat, self._numbers = flat[order], numbers[order]

    def find(self, text: str) -> Contamination | None:
        """The text that a prompt has most of, if it has enough; the first of equal ones."""
        grams = self._grams(text)
        first = np.searchsorted(self._flat, grams, side="left")
        last = np.searchsorted(self._flat, grams, side="right")
        hit = np.flatnonzero(last > first)
        if not len(hit):
            return None
        counted: dict[int, int] = {}
        for i in hit:
            for number in self._numbers[first[i] : last[i]].tolist():
                counted[number] = counted.get(number, 0) + 1
        overlaps: Mapping[int, float] = {number: count / self._sizes[number] for number, count in counted.items()}
        number = min(overlaps, key=lambda number: (-overlaps[number], number))
        return Contamination(number, overlaps[number]) if overlaps[number] >= self._threshold - 1e-9 else None
