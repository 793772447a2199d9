"""Which positions of two tokenizations of one text can be compared: those that end at the same byte.

There both models have read the same text, so what one expects next can teach the other. Coordinates are those of the
canonical stream (`fusemega.text.sample`), which both tokenizers' samples carry: no text is tokenized again. A linear
merge of two lists takes the place of the dynamic time warping of FuseLLM and FuseChat (`fusemega.align.dtw`).

Shapes: P positions of a row or sample, one number a side; M positions that they share.
"""

from __future__ import annotations

import numpy as np


def shared_positions(source_end_P: np.ndarray, target_end_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The positions of source and target that end at the same byte (>= 0), as two int64 [M], by rising byte.

    Several positions end at one byte where a template writes tokens that no content has, and where a tokenizer cannot
    tell the bytes of a character apart: the last of them counts, for it is the one that goes on with the text.
    """
    source_ends, source_at = _last_at(source_end_P)
    target_ends, target_at = _last_at(target_end_P)
    _, in_source, in_target = np.intersect1d(source_ends, target_ends, assume_unique=True, return_indices=True)
    return source_at[in_source], target_at[in_target]


def _last_at(end_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct bytes >= 0, rising, and the last position that ends at each."""
    ends, from_back = np.unique(end_P[::-1], return_index=True)
    known = ends >= 0
    return ends[known], len(end_P) - 1 - from_back[known]
