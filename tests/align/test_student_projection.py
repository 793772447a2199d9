"""X-Token's projection matrix against its description in plain loops, and on real tokenizers."""

from __future__ import annotations

import random

import numpy as np
import pytest

from fusemega.align.pieces import cutter
from fusemega.align.student_projection import StudentProjection, student_projection
from fusemega.align.vocabulary import Vocabulary
from tests.align.real import real_tokenizers
from tests.align.test_maps import made_up


def dense(found: StudentProjection, vocab_size: int) -> np.ndarray:
    """W [vocab_size, S]."""
    W = np.zeros((vocab_size, len(found.table_S)))
    for g, column in enumerate(found.table_S.tolist()):
        for v, group, weight in zip(found.members_E, found.group_E, found.weight_E, strict=True):
            if column == vocab_size + group:
                W[v, g] = weight
        if 0 <= column < vocab_size:
            W[column, g] = 1.0
    return W


def letters(teacher: Vocabulary, content: bytes) -> list[int]:
    """Pieces of up to two bytes, where the teacher has them."""
    found = []
    while content:
        size = 2 if content[:2] in teacher.contents else 1
        if content[:size] in teacher.contents:
            found.append(teacher.contents.index(content[:size]))
        content = content[size:]
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("max_pieces", [1, 2, 4])
def test_weights_are_what_plain_loops_make(seed: int, max_pieces: int) -> None:
    rng = random.Random(seed)
    student, teacher = made_up(rng, 60, closing_id=1), made_up(rng, 25, closing_id=1, content_hash="teacher")
    size, spare = student.size - 2, teacher.size + 3
    found = student_projection(student, teacher, lambda c: letters(teacher, c), size, spare, max_pieces)
    wanted = np.zeros((size, spare))
    for v, content in enumerate(student.contents[:size]):
        if v in (0, 1):
            wanted[v, v] = 1.0  # bos, and the end of a turn and a text
        elif content and content in teacher.contents:
            ids = [g for g, other in enumerate(teacher.contents) if other == content]
            wanted[v, min(ids, key=lambda g: (g in teacher.byte_tokens, g))] = 1.0
        elif content:
            pieces = letters(teacher, content)[:max_pieces]
            total = sum(0.9 * 0.1**i for i in range(len(pieces)))
            for i, g in enumerate(pieces):
                wanted[v, g] += 0.9 * 0.1**i / total
    np.testing.assert_allclose(dense(found, size), wanted, rtol=1e-14, atol=0)
    sums = wanted.sum(1)
    assert {0, 1} <= set(sums.round(12)) and ((sums < 1e-12) | (abs(sums - 1) < 1e-12)).all()
    assert (
        found.num_groups > 3
        and found.content_hash
        != student_projection(
            student, teacher, lambda c: letters(teacher, c)[::-1], size, spare, max_pieces
        ).content_hash
    )


def test_one_tokenizer_is_the_identity() -> None:
    vocabulary = made_up(random.Random(1), 20)
    found = student_projection(vocabulary, vocabulary, lambda c: [], 30, 40)
    assert found.table_S.tolist() == [*range(30), *[-1] * 10] and found.num_groups == 0


def test_numbers_of_three_digits_become_digits() -> None:
    """The paper's own case: Llama-3 has a token for "201", and Qwen writes three."""
    tokenizers = real_tokenizers("llama3", "qwen2.5")
    (_, student), (tokenizer, teacher) = tokenizers["llama3"], tokenizers["qwen2.5"]
    found = student_projection(student, teacher, cutter(tokenizer, teacher), student.size, teacher.size)
    row = row_of(found, student.contents.index(b"201"), student.size)
    digits = [teacher.contents.index(digit) for digit in (b"2", b"0", b"1")]
    assert sorted(row) == sorted(digits)
    assert [row[g] for g in digits] == pytest.approx([0.9 / 0.999, 0.09 / 0.999, 0.009 / 0.999])
    assert row_of(found, student.contents.index(b" the"), student.size) == {teacher.contents.index(b" the"): 1.0}
    totals = np.bincount(found.members_E, found.weight_E, minlength=student.size)
    assert totals.max() <= 1 + 1e-12


def row_of(found: StudentProjection, v: int, vocab_size: int) -> dict[int, float]:
    """Row v of W."""
    row = {int(g): 1.0 for g in np.flatnonzero(found.table_S == v)}
    for at in np.flatnonzero(found.members_E == v):
        (g,) = np.flatnonzero(found.table_S == vocab_size + found.group_E[at])
        row[int(g)] = float(found.weight_E[at])
    return row
