"""The nearest string against a plain loop over all of them."""

from __future__ import annotations

import random

import pytest

from fusemega.align.mined import Nearest
from tests.align.published import levenshtein


def words(rng: random.Random, count: int, letters: str, longest: int) -> list[str]:
    return ["".join(rng.choices(letters, k=rng.randint(0, longest))) for _ in range(count)]


@pytest.mark.parametrize(("letters", "longest"), [("ab", 6), ("abc é今\udce2", 9), ("xy", 80)])
def test_made_up_strings_with_many_ties(letters: str, longest: int) -> None:
    rng = random.Random(longest)
    offered, asked = words(rng, 50, letters, longest), words(rng, 30, letters + "?", longest)
    near = Nearest(offered)
    index_Q, distance_Q = near.find(asked)
    for query, index, distance in zip(asked, index_Q, distance_Q, strict=True):
        distances = [levenshtein(query, text) for text in offered]
        assert (index, distance) == (distances.index(min(distances)), min(distances))  # the first of the nearest
        for d in range(4):
            assert near.ties(query, d).tolist() == [i for i, found in enumerate(distances) if found == d]


def test_threads_and_progress_change_nothing() -> None:
    rng = random.Random(1)
    offered, asked = words(rng, 300, "abcdef", 8), words(rng, 1300, "abcdef", 8)
    told: list[int] = []
    one = Nearest(offered).find(asked, workers=1, progress=told.append)
    three = Nearest(offered).find(asked, workers=3)
    assert all((a == b).all() for a, b in zip(one, three, strict=True))
    assert sum(told) == 1300 and len(told) > 1
