"""Kinds of shared positions: whether the two next tokens end at the same byte, or which of them is the longer one.

At a shared position both models have read the same text, and both predict a token that begins there. The text's own
next tokens of the two may end at the same byte (`equal`), or one of them later: the other is then a beginning of it.
Only at equal positions is the label an event of both vocabularies; a bad map shows at the others.

Shape suffixes: P positions of a row or sample (each side has its own number), M positions that match.
"""

from __future__ import annotations

import numpy as np

from fusemega.text.sample import Sample

EQUAL, TARGET_LONGER, TEACHER_LONGER, UNRELATED = range(4)
POSITION_KINDS = ("equal", "target longer", "teacher longer", "unrelated")
"""By number. `unrelated`: the end of a next token is not known, for example of a closing of several tokens."""


def position_kinds(source_end_P: np.ndarray, source_M: np.ndarray, sample: Sample, target_M: np.ndarray) -> np.ndarray:
    """The kind of each shared position, int8 [M].

    Args:
        source_end_P: end bytes of the teacher's row.
        source_M, target_M: the shared positions of the row and of the sample, as `shared_positions` returns them.
        sample: the target's; its P positions are `sample.positions`.

    Example: "a", "bcd", "e", closing for the teacher and "a", "bc", "de", closing for the target.

        >>> ids, ends = np.zeros(5, dtype=np.int32), np.array([0, 1, 3, 5, 6])
        >>> target = Sample(b"", ids, np.array([False, True, True, True, True]), ends, 5, "")
        >>> kinds = position_kinds(np.array([0, 1, 4, 5]), np.array([0, 1, 3]), target, np.array([0, 1, 3]))
        >>> [POSITION_KINDS[kind] for kind in kinds]
        ['equal', 'teacher longer', 'equal']
    """
    positions_P = sample.positions
    target_next_P = sample.end_bytes[positions_P + 1].astype(np.int64)
    source_next_M = np.append(source_end_P[1:], -1).astype(np.int64)[source_M]
    # A row has no position after the last token of a supervised part: what follows it there is of another part. That
    # token ends where the part ends, for either side.
    part_P = np.cumsum(np.diff(positions_P, prepend=positions_P[:1]) > 1)
    ends_part_P = np.append(part_P[1:] != part_P[:-1], True)[: len(part_P)]
    part_end_M = target_next_P[ends_part_P][part_P[target_M]]
    is_last_M = (source_M == len(source_end_P) - 1) | ((part_end_M >= 0) & (source_next_M > part_end_M))
    source_next_M = np.where(is_last_M, part_end_M, source_next_M)
    here_M, target_next_M = sample.end_bytes[positions_P[target_M]], target_next_P[target_M]
    known_M = (source_next_M > here_M) & (target_next_M > here_M)
    longer_M = np.where(target_next_M > source_next_M, TARGET_LONGER, TEACHER_LONGER)
    kinds_M = np.where(target_next_M == source_next_M, EQUAL, longer_M)
    return np.where(known_M, kinds_M, UNRELATED).astype(np.int8)
