"""For each string the nearest of many others by edit distance (Levenshtein), exactly: FuseLLM's "MinED".

250,000 strings against 150,000 are 4e10 pairs. Nearly all of them need no distance, because two lower bounds rule them
out: the difference in length, and the characters that one string has and the other lacks. The other pairs are measured
with Myers' bit-parallel recurrence (in Hyyrö's form), one machine word for each column. The strings are distributed
over threads; the result does not depend on their number.

Shape suffixes: Q strings asked for, B of these in one work item, N strings to choose from, C characters of all strings
of a list, A distinct characters, L lengths of strings.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numba.extending import intrinsic

_BLOCK = 512  # strings in one work item
_WORD = 64  # bits of a machine word; a longer query takes the plain recurrence


@dataclass(frozen=True)
class _Strings:
    """A list of strings as numbers. `chars_C` int32, `begin_N` int64 [N + 1], `bag_N` uint64: see `_bags`."""

    chars_C: np.ndarray
    begin_N: np.ndarray
    bag_N: np.ndarray


class Nearest:
    """Strings to choose from, prepared once.

    Args:
        strings: distinct or not; among equally near ones, the first is chosen.

    Example:

        >>> place, distance = Nearest(["cat", "house", "mouse"]).find(["mouses", "bat"], workers=1)
        >>> place.tolist(), distance.tolist()
        ([2, 0], [1, 1])
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._alphabet = np.unique(_codes(strings))
        # Sorted by length, and within one length in the given order.
        lengths_N = np.array([len(text) for text in strings], dtype=np.int64)
        self._order_N = np.argsort(lengths_N, kind="stable")
        self._strings = self._numbered([strings[i] for i in self._order_N])
        longest = int(lengths_N.max(initial=0))
        self._bucket_L = np.searchsorted(lengths_N[self._order_N], np.arange(longest + 2))

    def find(
        self, queries: Sequence[str], workers: int | None = None, progress: Callable[[int], None] = lambda count: None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The nearest string of each query.

        Args:
            workers: threads; by default one for each core.
            progress: called with the number of queries that a work item has answered.

        Returns:
            index_Q int64, the place in the list; distance_Q int64.
        """
        assert len(self._order_N), "nothing to choose from"
        asked = self._numbered(queries)
        index_Q, distance_Q = np.empty(len(queries), dtype=np.int64), np.empty(len(queries), dtype=np.int64)

        def search(begin: int) -> int:
            end = min(begin + _BLOCK, len(queries))
            found = index_Q[begin:end], distance_Q[begin:end]
            _search(begin, *_parts(asked), *_parts(self._strings), self._order_N, self._bucket_L, self._letters, *found)
            return end - begin

        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            for count in pool.map(search, range(0, len(queries), _BLOCK)):
                progress(count)
        return index_Q, distance_Q

    def ties(self, query: str, distance: int) -> np.ndarray:
        """Places, ascending, of all strings at exactly that distance from `query`."""
        found_N = np.empty(len(self._order_N), dtype=np.int64)
        count = _at_distance(
            *_parts(self._numbered([query])), *_parts(self._strings), self._order_N, self._letters, distance, found_N
        )
        return np.sort(found_N[:count])

    @property
    def _letters(self) -> int:
        return len(self._alphabet) + 1

    def _numbered(self, strings: Sequence[str]) -> _Strings:
        """Characters as places in the alphabet; those of queries alone share one number, which matches nothing."""
        codes_C = _codes(strings)
        place_C = np.searchsorted(self._alphabet, codes_C)
        known_C = self._alphabet[np.minimum(place_C, len(self._alphabet) - 1)] == codes_C
        chars_C = np.where(known_C, place_C, len(self._alphabet)).astype(np.int32)
        begin_N = np.concatenate(([0], np.cumsum([len(text) for text in strings], dtype=np.int64)))
        return _Strings(chars_C, begin_N, _bags(codes_C, begin_N))


def _parts(strings: _Strings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return strings.chars_C, strings.begin_N, strings.bag_N


def _codes(strings: Sequence[str]) -> np.ndarray:
    """uint32 [C]; bytes of broken UTF-8, which are lone surrogates here, are characters like others."""
    return np.frombuffer("".join(strings).encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _count_bits(typing: Any, word: Any) -> Any:
    return word(word), lambda context, builder, signature, args: builder.ctpop(args[0])


_popcount: Any = intrinsic(_count_bits)


@numba.njit(cache=True, nogil=True)
def _bags(codes_C, begin_N):
    """uint64 [N], which characters a string has. A class of characters has two bits: whether there is one, and
    whether there are two. Bits that one bag has and the other lacks number at most the edits between the strings."""
    bag_N = np.zeros(len(begin_N) - 1, dtype=np.uint64)
    for i in range(len(bag_N)):
        bag = np.uint64(0)
        for c in range(begin_N[i], begin_N[i + 1]):
            first = np.uint64(1) << ((codes_C[c] & np.uint64(31)) << np.uint64(1))
            bag |= (first << np.uint64(1)) if bag & first else first
        bag_N[i] = bag
    return bag_N


@numba.njit(cache=True, nogil=True)
def _search(
    offset, chars_C, begin_Q, bag_Q, to_C, to_begin_N, to_bag_N, order_N, bucket_L, letters, index_B, distance_B
):
    """The nearest string of each of the B queries from `offset` on."""
    masks_A = np.zeros(letters, dtype=np.uint64)
    longest = len(bucket_L) - 2
    for b in range(len(index_B)):
        q = offset + b
        query = chars_C[begin_Q[q] : begin_Q[q + 1]]
        length, bag = len(query), bag_Q[q]
        _set_masks(masks_A, query)
        best, best_index = np.int64(1) << 40, np.int64(-1)
        for difference in range(max(length, longest) + 1):
            if difference > best:  # no distance is less than the difference in length
                break
            for sign in range(2):
                other = length - difference if sign else length + difference
                if other < 0 or other > longest or (sign and difference == 0):
                    continue
                for n in range(bucket_L[other], bucket_L[other + 1]):
                    bound = max(difference, _lower_bound(bag, to_bag_N[n]))
                    if bound > best or (bound == best and order_N[n] > best_index):
                        continue
                    found = _distance(query, masks_A, to_C[to_begin_N[n] : to_begin_N[n + 1]], best)
                    if found < best or (found == best and order_N[n] < best_index):
                        best, best_index = found, order_N[n]
        _clear_masks(masks_A, query)
        index_B[b], distance_B[b] = best_index, best


@numba.njit(cache=True, nogil=True)
def _at_distance(query, begin_Q, bag_Q, to_C, to_begin_N, to_bag_N, order_N, letters, distance, found_N):
    masks_A = np.zeros(letters, dtype=np.uint64)
    _set_masks(masks_A, query)
    count = 0
    for n in range(len(order_N)):
        if _lower_bound(bag_Q[0], to_bag_N[n]) <= distance:
            if _distance(query, masks_A, to_C[to_begin_N[n] : to_begin_N[n + 1]], distance) == distance:
                found_N[count] = order_N[n]
                count += 1
    return count


@numba.njit(cache=True, nogil=True, inline="always")
def _lower_bound(bag, other):
    return np.int64(max(_popcount(bag & ~other), _popcount(other & ~bag)))


@numba.njit(cache=True, nogil=True)
def _set_masks(masks_A, query):
    """Sets, for each character, the bits of its places in the query. The last letter stands for characters that are in
    no string of the list, so it matches nothing."""
    if len(query) <= _WORD:
        for i in range(len(query)):
            masks_A[query[i]] |= np.uint64(1) << np.uint64(i)
        masks_A[-1] = 0


@numba.njit(cache=True, nogil=True)
def _clear_masks(masks_A, query):
    for c in query:
        masks_A[c] = 0


@numba.njit(cache=True, nogil=True)
def _distance(query, masks_A, text, most):
    """The Levenshtein distance, or some number above `most` if it is above `most`."""
    if len(query) == 0 or len(query) > _WORD:
        return _plain_distance(query, text)
    one = np.uint64(1)
    last = one << np.uint64(len(query) - 1)
    up, down = ~np.uint64(0), np.uint64(0)  # where the column rises and falls from one place to the next
    score = len(query)
    for j in range(len(text)):
        equal = masks_A[text[j]]
        diagonal = (((equal & up) + up) ^ up) | equal | down
        right_up = down | ~(diagonal | up)
        right_down = diagonal & up
        if right_up & last:
            score += 1
        elif right_down & last:
            score -= 1
        if score - (len(text) - 1 - j) > most:
            return most + 1
        right_up = (right_up << one) | one
        up = (right_down << one) | ~(diagonal | right_up)
        down = right_up & diagonal
    return score


@numba.njit(cache=True, nogil=True)
def _plain_distance(query, text):
    row = np.arange(len(text) + 1)
    for i in range(len(query)):
        diagonal, row[0] = row[0], i + 1
        for j in range(len(text)):
            above = row[j + 1]
            row[j + 1] = min(min(above, row[j]) + 1, diagonal + (query[i] != text[j]))
            diagonal = above
    return row[len(text)]
