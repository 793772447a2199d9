"""Aligns two tokenizations of one text: two positions match if they end at the same byte.

At such positions both models have read the same text, so the prediction of one can teach the other. End bytes are those
of the canonical stream (`fusemega.text.sample`), which both tokenizers' samples carry, so no text is tokenized again.
This merge of two sorted lists replaces the dynamic time warping of FuseLLM and FuseChat (`fusemega.align.dtw`).

Shape suffixes: P positions of a row or sample (each side has its own number), M positions that match.
"""

from __future__ import annotations

import numpy as np


def shared_positions(source_end_P: np.ndarray, target_end_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The positions of source and target that end at the same byte (>= 0), as two int64 [M], in order of the bytes.

    Several positions end at one byte if a template writes tokens between contents, or if a tokenizer does not separate
    the bytes of a character. The last of them is used, because the text continues after it.

    Example: "Hello" as "He", "llo" and as "H", "el", "lo"; both have read the same text after their last token.

        >>> source, target = shared_positions(np.array([2, 5]), np.array([1, 3, 5]))
        >>> source.tolist(), target.tolist()
        ([1], [2])
    """
    source_ends, source_at = _last_at(source_end_P)
    target_ends, target_at = _last_at(target_end_P)
    _, in_source, in_target = np.intersect1d(source_ends, target_ends, assume_unique=True, return_indices=True)
    return source_at[in_source], target_at[in_target]


def _last_at(end_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct bytes >= 0, rising, and the last position that ends at each."""
    # `np.unique` gives the first place of each value: of the reversed array, the last.
    ends, from_back = np.unique(end_P[::-1], return_index=True)
    known = ends >= 0
    return ends[known], len(end_P) - 1 - from_back[known]
