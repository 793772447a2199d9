"""Equally near tokens by their neighbours, against dictionaries and plain loops."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest

from fusemega.align import pairs
from fusemega.align.cooccurrence import Neighbours, most_alike
from fusemega.align.make_map import mined_map
from tests.align.map_loops import vocabulary


def vectors(sequences: list[np.ndarray], axes: list[int]) -> dict[int, Counter]:
    found: dict[int, Counter] = {}
    for ids in sequences:
        for i, token in enumerate(ids.tolist()):
            for j in range(max(0, i - 5), min(len(ids), i + 6)):
                if j != i and axes[ids[j]] >= 0:
                    found.setdefault(token, Counter())[axes[ids[j]]] += 1
    return found


def cosine(a: Counter, b: Counter) -> float:
    length = math.sqrt(sum(n * n for n in a.values()) * sum(n * n for n in b.values()))
    return sum(a[axis] * b[axis] for axis in a) / length if length else 0.0


@pytest.mark.parametrize("merge", [1 << 22, 40])
def test_against_plain_loops(merge: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "_MERGE", merge)  # counted at once, and in many pieces
    rng = random.Random(3)
    axes = [[rng.choice((-1, *range(6))) for _ in range(12)] for _ in range(2)]
    texts = [[np.array(rng.choices(range(11), k=rng.randint(0, 30)), dtype=np.int32) for _ in range(8)] for _ in axes]
    near = [Neighbours.count(texts[k], np.array(axes[k])) for k in range(2)]
    loops = [vectors(texts[k], axes[k]) for k in range(2)]
    for k in range(2):
        for token in range(12):
            axis, count = near[k].of(token)
            assert dict(zip(axis.tolist(), count.tolist(), strict=True)) == loops[k].get(token, {})
    for token in range(12):
        candidates = sorted(rng.sample(range(12), 4))
        ours = loops[0].get(token, Counter())
        scores = [cosine(ours, loops[1].get(candidate, Counter())) for candidate in candidates]
        assert most_alike(token, np.array(candidates), *near) == candidates[int(np.argmax(np.round(scores, 12)))]


def test_a_tie_goes_to_the_token_among_the_same_words() -> None:
    source, target = vocabulary([b"x", b"y", b"cot", b"cut"]), vocabulary([b"x", b"y", b"cat", b"cit"])
    axes = np.array([0, 1, -1, -1])
    # "cot" and "cit" stand beside "y", "cat" beside "x"; "cut" stands nowhere.
    near = Neighbours.count([np.array([1, 2, 1])], axes), Neighbours.count([np.array([0, 2]), np.array([3, 1])], axes)
    assert mined_map(source, target).table_S.tolist() == [0, 1, 2, 2]
    assert mined_map(source, target, neighbours=near).table_S.tolist() == [0, 1, 3, 2]
