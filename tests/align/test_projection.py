"""Rows in the target's ids, against plain loops in float64."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from fusemega.align.projection import project, sum_duplicates

NONE = -math.inf


def by_loops(ids: list[int], logp: list[float], residual: float, table: list[int]) -> tuple[dict[int, float], float]:
    masses: dict[int, float] = {}
    rest = math.exp(residual)
    for i, value in zip(ids, logp, strict=True):
        if i < 0:
            continue
        if table[i] < 0:
            rest += math.exp(value)
        else:
            masses[table[i]] = masses.get(table[i], 0.0) + math.exp(value)
    return masses, rest


def rows(rng: random.Random, positions: int, k: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids, logp, residual = [], [], []
    for _ in range(positions):
        weights = [rng.expovariate(1) ** 3 for _ in range(k + 1)]
        filled = rng.randint(0, k) if rng.random() < 0.3 else k
        ids.append(rng.sample(range(size), filled) + [-1] * (k - filled))
        total = sum(weights[:filled]) + weights[-1]
        listed = sorted((math.log(w / total) for w in weights[:filled]), reverse=True)
        logp.append(listed + [NONE] * (k - filled))
        residual.append(math.log(weights[-1] / total))
    return np.array(ids, dtype=np.int32), np.array(logp, dtype=np.float32), np.array(residual, dtype=np.float32)


def test_projection_against_loops() -> None:
    rng = random.Random(1)
    ids, logp, residual = rows(rng, 300, 6, 20)
    tables = np.array([[rng.randint(-1, 7) for _ in range(20)] for _ in range(3)], dtype=np.int32)
    choice = np.array([rng.randrange(3) for _ in range(300)])
    got_ids, got_logp, got_residual = project(ids, logp, residual, tables, choice)
    assert got_ids.dtype == np.int64 and got_logp.dtype == got_residual.dtype == np.float32
    for p in range(300):
        masses, rest = by_loops(ids[p].tolist(), logp[p].tolist(), residual[p], tables[choice[p]].tolist())
        count = len(masses)
        assert set(masses) == set(got_ids[p, :count].tolist())
        assert (got_ids[p, count:] == -1).all() and (got_logp[p, count:] == NONE).all()
        assert got_logp[p, :count] == pytest.approx([math.log(masses[int(i)]) for i in got_ids[p, :count]], abs=2e-6)
        assert got_residual[p] == pytest.approx(math.log(rest), abs=2e-6)
        assert (np.diff(got_logp[p, :count]) <= 0).all()


def test_one_table_serves_all_positions() -> None:
    rng = random.Random(2)
    ids, logp, residual = rows(rng, 20, 4, 9)
    table = np.array([3, 3, -1, 0, 1, 2, 3, 8, 5], dtype=np.int32)
    for got, expected in zip(
        project(ids, logp, residual, table),
        project(ids, logp, residual, np.stack([table, table * 0]), np.zeros(20, dtype=int)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, expected)


def test_rows_at_the_edge() -> None:
    ids = np.array([[0, 1, 2], [0, 1, 2], [0, 1, -1], [2, 0, 1], [-1, -1, -1]])
    logp = np.array([[-800, -801, -802], [-1e-8, -20, -20], [0, NONE, NONE], [-1, -1.5, -2], [NONE] * 3], np.float32)
    residual = np.array([-0.0, -30, NONE, -1, 0], np.float32)
    got_ids, got_logp, got_residual = project(ids, logp, residual, np.array([5, 5, -1]))
    assert got_ids.tolist() == [[5, -1, -1]] * 4 + [[-1, -1, -1]]
    assert got_logp[0, 0] == pytest.approx(-800 + math.log1p(math.exp(-1)), abs=1e-4)  # far below exp's range
    assert got_residual[1] == pytest.approx(-20, abs=1e-4)  # the dropped id's mass, not 1 - sum
    assert got_logp[2, 0] == 0 and got_residual[2] == NONE
    assert got_residual[4] == 0 and not np.isnan(got_logp).any()


def test_no_positions_and_unknown_ids() -> None:
    empty = project(np.empty((0, 3), int), np.empty((0, 3), np.float32), np.empty(0, np.float32), np.array([1]))
    assert [column.shape for column in empty] == [(0, 3), (0, 3), (0,)]
    with pytest.raises(IndexError):
        project(np.array([[7]]), np.zeros((1, 1), np.float32), np.zeros(1, np.float32), np.array([1]))


def test_sum_duplicates_by_hand() -> None:
    ids = np.array([[3, 5, 3, -1, 9], [7, 7, 7, 7, 7], [-1, -1, -1, -1, -1], [1, 2, 3, 4, 5]])
    p = np.array([[0.1, 0.3, 0.25, 0.2, 0.0], [0.1] * 5, [0.2] * 5, [0.1, 0.2, 0.3, 0.05, 0.15]])
    with np.errstate(divide="ignore"):
        got_ids, got_logp = sum_duplicates(ids, np.log(p))
    assert got_ids.tolist() == [[3, 5, 9, -1, -1], [7, -1, -1, -1, -1], [-1] * 5, [3, 2, 5, 1, 4]]
    wanted = [[0.35, 0.3, 0, 0, 0], [0.5, 0, 0, 0, 0], [0] * 5, [0.3, 0.2, 0.15, 0.1, 0.05]]
    np.testing.assert_allclose(np.exp(got_logp), wanted, atol=1e-7)
    assert [part.shape for part in sum_duplicates(np.empty((0, 4), np.int64), np.empty((0, 4)))] == [(0, 4), (0, 4)]
