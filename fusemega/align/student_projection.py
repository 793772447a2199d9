"""X-Token's projection (arXiv:2605.21699): a student's probabilities as probabilities of the teacher's tokens.

A sparse matrix W of student ids and teacher ids, whose rows sum to 1 or are empty; the projected probability of teacher
token g is sum_v q(v) W[v, g].

* A student token whose bytes a teacher token has: 1 for that token.
* Another one that the teacher's tokenizer cuts into pieces: 0.9 * 0.1^i for the i-th of the first `max_pieces` pieces,
  scaled so that the row sums to 1. A piece that occurs twice gets both.
* Tokens of the same role (bos, eos, the end of a turn): 1. Other special tokens, and tokens that the teacher cannot
  write: nothing.

The weights, the number of pieces (4 in NeMo-RL and TRL) and the row sums are the published ones. Decided here: bytes
are compared instead of decoded strings, roles instead of similar names of special tokens. TRL also adds the pieces that
the student's tokenizer cuts the teacher's tokens into, and then sets tokens of both vocabularies back to 1
(`reapply_exact_map`); here that pass is left out, so a teacher token longer than any student token gets nothing.

Shape suffixes: S ids of the teacher's vocabulary, E entries of W in columns with more than one entry or weight.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fusemega.align.make_map import by_role, ids_by_content
from fusemega.align.vocabulary import Vocabulary


@dataclass(frozen=True)
class StudentProjection:
    """W by columns, as the vocabulary kernel takes groups of ids.

    Attributes:
        table_S: int64, for each teacher id the student id v whose probability it gets (a column with one entry, of
            weight 1); `vocab_size` + a group's number; or -1 for an empty column.
        members_E: int64, student ids in groups.
        group_E: int64, the group of each.
        weight_E: float64, in (0, 1].
        num_groups: number of groups.
        same_start, same_text: whether the first token of a message, or of a plain text, carries a space that is not in
            it for both tokenizers or for neither.
    """

    table_S: np.ndarray
    members_E: np.ndarray
    group_E: np.ndarray
    weight_E: np.ndarray
    num_groups: int
    same_start: bool = True
    same_text: bool = True

    @property
    def content_hash(self) -> str:
        """Hash, in hex, of all of it."""
        digest = hashlib.blake2b(bytes([self.same_start, self.same_text]), digest_size=16)
        for array, kind in (
            (self.table_S, "<i8"),
            (self.members_E, "<i8"),
            (self.group_E, "<i8"),
            (self.weight_E, "<f8"),
        ):
            digest.update(np.ascontiguousarray(array, dtype=kind).tobytes())
        return digest.hexdigest()


def student_projection(
    student: Vocabulary,
    teacher: Vocabulary,
    cut: Callable[[bytes], list[int]],
    vocab_size: int,
    teacher_size: int,
    max_pieces: int = 4,
) -> StudentProjection:
    """W for two tokenizers; the identity if they are the same.

    Args:
        cut: the teacher's pieces of a content; `fusemega.align.pieces.cutter` makes it.
        vocab_size, teacher_size: sizes of the two models' vocabularies; student ids beyond are left out.
    """
    if student.content_hash == teacher.content_hash:
        columns = {g: {g: 1.0} for g in range(min(vocab_size, teacher_size))}
        return by_columns(columns, vocab_size, teacher_size)
    index, roles = ids_by_content(teacher), by_role(student, teacher)
    columns = defaultdict[int, dict[int, float]](dict)
    for v, content in enumerate(student.contents[:vocab_size]):
        if v in roles:
            pieces = [roles[v]]
        elif not content:
            continue
        else:
            pieces = [index[content]] if content in index else cut(content)[:max_pieces]
        decays = [0.9 * 0.1**i for i in range(len(pieces))]
        for g, decay in zip(pieces, decays, strict=True):
            columns[g][v] = columns[g].get(v, 0.0) + decay / sum(decays)
    same_start, same_text = student.marks_start == teacher.marks_start, student.marks_text == teacher.marks_text
    return by_columns(columns, vocab_size, teacher_size, same_start, same_text)


def by_columns(
    columns: Mapping[int, Mapping[int, float]],
    vocab_size: int,
    teacher_size: int,
    same_start: bool = True,
    same_text: bool = True,
) -> StudentProjection:
    """The projection whose columns are given: teacher id -> student id -> weight.

    Example: 6 is one student token; 2 is two of them, one only with a part of its probability.

        >>> found = by_columns({6: {3: 1.0}, 2: {4: 1.0, 5: 0.9}}, vocab_size=10, teacher_size=8)
        >>> found.table_S.tolist(), found.members_E.tolist(), found.weight_E.tolist()
        ([-1, -1, 10, -1, -1, -1, 3, -1], [4, 5], [1.0, 0.9])
    """
    table_S = np.full(teacher_size, -1, dtype=np.int64)
    entries: list[tuple[int, int, float]] = []
    num_groups = 0
    for g, column in sorted(columns.items()):
        if len(column) == 1 and (only := next(iter(column.items())))[1] == 1.0:
            table_S[g] = only[0]
        else:
            table_S[g] = vocab_size + num_groups
            entries += [(v, num_groups, min(weight, 1.0)) for v, weight in sorted(column.items())]
            num_groups += 1
    members_E, group_E = (np.array([entry[i] for entry in entries], dtype=np.int64) for i in (0, 1))
    weight_E = np.array([entry[2] for entry in entries], dtype=np.float64)
    return StudentProjection(table_S, members_E, group_E, weight_E, num_groups, same_start, same_text)
