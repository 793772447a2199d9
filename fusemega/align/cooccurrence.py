"""Chooses among equally near tokens the one with the most similar neighbours in a corpus (FuseLLM's option for MinED).

A token's vector counts the tokens within five places of it in a corpus. Vectors of two vocabularies are compared by
cosine over the tokens that both have, byte for byte. The paper does not define these axes; this is our choice.

Shape suffixes: S ids of a vocabulary, C pairs of a token and a neighbour that occur, L tokens of a text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fusemega.align.pairs import PairCounts, merged

REACH = 5  # places on either side of a token


@dataclass(frozen=True)
class Neighbours:
    """The vectors of a vocabulary, sparse. `begin_S` int64 [S + 1] into `axis_C` and `count_C`, both int64."""

    begin_S: np.ndarray
    axis_C: np.ndarray
    count_C: np.ndarray

    @classmethod
    def count(cls, sequences: Iterable[np.ndarray], axis_S: np.ndarray) -> Neighbours:
        """The vectors of all tokens.

        Args:
            sequences: int32 [L] each, the tokens of a text.
            axis_S: the axis on which a neighbour counts, or -1 for none.
        """
        found = merged(_near(ids.astype(np.int64), axis_S) for ids in sequences)
        begin_S = np.searchsorted(found.source_C, np.arange(len(axis_S) + 1))
        return cls(begin_S, found.target_C, found.count_C)

    def of(self, token: int) -> tuple[np.ndarray, np.ndarray]:
        """The axes, ascending, and the counts of one token."""
        here = slice(self.begin_S[token], self.begin_S[token + 1])
        return self.axis_C[here], self.count_C[here]


def most_alike(token: int, candidates: np.ndarray, source: Neighbours, target: Neighbours) -> int:
    """The one of the target's `candidates`, ascending, whose vector is most like that of the source's `token`. Ties go
    to the first, also if none shares a neighbour with it."""
    axis, count = source.of(token)
    best, found = 0.0, int(candidates[0])
    for candidate in candidates[target.begin_S[candidates + 1] > target.begin_S[candidates]].tolist():
        other_axis, other_count = target.of(candidate)
        _, ours, theirs = np.intersect1d(axis, other_axis, assume_unique=True, return_indices=True)
        # The length of the token's own vector is the same for all candidates.
        cosine = float(count[ours] @ other_count[theirs]) / float(np.linalg.norm(other_count))
        if cosine > best:
            best, found = cosine, candidate
    return found


def _near(ids_L: np.ndarray, axis_S: np.ndarray) -> PairCounts:
    """Each token of a text with the axes of its neighbours, one by one."""
    tokens, axes = [], []
    for step in range(1, REACH + 1):
        tokens += [ids_L[step:], ids_L[:-step]]
        axes += [axis_S[ids_L[:-step]], axis_S[ids_L[step:]]]
    token_C, axis_C = np.concatenate(tokens), np.concatenate(axes).astype(np.int64)
    kept = axis_C >= 0
    return PairCounts(token_C[kept], axis_C[kept], np.ones(int(kept.sum()), dtype=np.int64))
