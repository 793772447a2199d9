"""The published alignment: dynamic time warping of two token sequences, for parity with FuseLLM and FuseChat.

FuseChat (arXiv:2402.16107; FuseAI, FuseChat/utils/align_token_and_vocab.py) decodes every id separately and finds the
cheapest monotone path between the two lists of strings:

    D[i, j] = cost(i, j) + min(D[i - 1, j], D[i, j - 1], D[i - 1, j - 1])

The cost is the edit distance of the two strings without their word markers; if one of them is only a marker, of both
strings with the target's marker. On the way back from the last pair to the first, ties go to the diagonal, then to the
target's previous token, then to the source's. FuseLLM (arXiv:2401.10491; FuseLLM/src/utils/others.py) compares the
tokens' forms in the vocabularies, always without markers, and prefers the source's previous token to the target's.

Edit distances are computed once for each pair of distinct strings, and paths in compiled code, with one byte for each
cell: 4 MB for 2,048 x 2,048 tokens.

Shape suffixes: M source tokens, N target tokens; A and B distinct strings among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numba
import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

if TYPE_CHECKING:  # transformers takes seconds to import, and workers do without it
    from fusemega.align.vocabulary import Vocabulary
    from fusemega.text.tokenizer import Tokenizer

Rules = Literal["fusechat", "fusellm"]
_DIAGONAL, _TARGET_BACK, _SOURCE_BACK = 0, 1, 2


@dataclass(frozen=True)
class Strings:
    """A tokenizer's tokens as strings; `decoded_strings` and `form_strings` make them.

    Attributes:
        of_id: the string of each id.
        marker: its word marker, "▁", "Ġ" or "".
        pad_id: id with which sequences are padded.
        rules: the published rules that they are for; the same on both sides.
    """

    of_id: tuple[str, ...]
    marker: str
    pad_id: int = 0
    rules: Rules = "fusechat"

    def padded(self, ids: np.ndarray, length: int) -> np.ndarray:
        """`ids`, padded on the right to `length`; longer ones stay as they are."""
        return np.pad(ids, (0, max(0, length - len(ids))), constant_values=self.pad_id)


def decoded_strings(tokenizer: Tokenizer, marker: str) -> Strings:
    """FuseChat's strings, `decode([id])` of each id: SentencePiece's markers vanish, byte-level ones become spaces,
    pieces of a character U+FFFD; unused ids are ""."""
    ids = [[i] for i in range(tokenizer.num_ids)]
    texts = tokenizer.hf.backend_tokenizer.decode_batch(ids, skip_special_tokens=False)
    return Strings(tuple(texts), marker, tokenizer.pad_id)


def form_strings(tokenizer: Tokenizer, vocabulary: Vocabulary) -> Strings:
    """FuseLLM's strings: the tokens as the vocabulary writes them."""
    return Strings(vocabulary.forms, vocabulary.marker, tokenizer.pad_id, "fusellm")


def dtw_reference(
    source_ids: np.ndarray, target_ids: np.ndarray, source: Strings, target: Strings
) -> tuple[np.ndarray, np.ndarray]:
    """The cheapest path through both sequences, each at least one token long.

    FuseChat first pads both sequences to one length (see `Strings.padded`), so the padding is part of the path.

    Returns:
        first_N, last_N int64: target token n is aligned with the source tokens first_N[n] to last_N[n] inclusive.

    Example: the source's "ab", "c" and the target's "a", "bc"; "a" matches "ab", and "bc" matches "c".

        >>> source, target = Strings(("ab", "c"), "", 0), Strings(("a", "bc"), "", 0)
        >>> first, last = dtw_reference(np.array([0, 1]), np.array([0, 1]), source, target)
        >>> first.tolist(), last.tolist()
        ([0, 1], [0, 1])
    """
    source_strings, source_M = _distinct(source_ids, source.of_id)
    target_strings, target_N = _distinct(target_ids, target.of_id)
    costs_AB = _costs(source_strings, target_strings, source.marker, target.marker, source.rules)
    return _path(costs_AB, source_M, target_N, source.rules == "fusellm")


def _distinct(ids: np.ndarray, of_id: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The distinct strings of a sequence, and which of them each token is."""
    distinct, place = np.unique(ids, return_inverse=True)
    strings = [of_id[i] for i in distinct]
    return strings, place


def _costs(source: list[str], target: list[str], source_marker: str, target_marker: str, rules: Rules) -> np.ndarray:
    """int32 [A, B], the cost of each pair of strings."""
    bare_source = [text.replace(source_marker, "") if source_marker else text for text in source]
    bare_target = [text.replace(target_marker, "") if target_marker else text for text in target]
    costs_AB = _distances(bare_source, bare_target)
    if rules == "fusellm":
        return costs_AB
    marked = [text.replace(source_marker, target_marker) if source_marker else text for text in source]
    for a in (a for a, text in enumerate(bare_source) if not text):
        costs_AB[a] = _distances([marked[a]], target)[0]
    for b in (b for b, text in enumerate(bare_target) if not text):
        costs_AB[:, b] = _distances(marked, [target[b]])[:, 0]
    return costs_AB


def _distances(source: list[str], target: list[str]) -> np.ndarray:
    return cdist(source, target, scorer=Levenshtein.distance, dtype=np.int32)


@numba.njit(cache=True, nogil=True)
def _path(costs_AB, source_M, target_N, source_first):
    """first_N, last_N of the cheapest path; which neighbour each cell came from is kept, not the sums."""
    num_source, num_target = len(source_M), len(target_N)
    infinite = np.int64(1) << 60
    move_MN = np.empty((num_source, num_target), dtype=np.uint8)
    above_N = np.full(num_target + 1, infinite)  # the row before, with the border in front
    above_N[0] = 0
    row_N = np.empty(num_target + 1, dtype=np.int64)
    for i in range(num_source):
        row_N[0] = infinite
        for j in range(num_target):
            best, move = above_N[j], _DIAGONAL
            if row_N[j] < best:
                best, move = row_N[j], _TARGET_BACK
            if above_N[j + 1] < best or (source_first and move != _DIAGONAL and above_N[j + 1] == best):
                best, move = above_N[j + 1], _SOURCE_BACK
            row_N[j + 1] = best + costs_AB[source_M[i], target_N[j]]
            move_MN[i, j] = move
        above_N, row_N = row_N, above_N
    first_N = np.empty(num_target, dtype=np.int64)
    last_N = np.empty(num_target, dtype=np.int64)
    i, j = num_source - 1, num_target - 1
    last_N[j] = i
    while i > 0 or j > 0:
        move = move_MN[i, j]
        if move != _SOURCE_BACK:
            first_N[j] = i
            j -= 1
        if move != _TARGET_BACK:
            i -= 1
        if move != _SOURCE_BACK:
            last_N[j] = i
    first_N[0] = 0
    return first_N, last_N
