"""Positions that two tokenizations share, against plain loops."""

from __future__ import annotations

import random

import numpy as np

from fusemega.align.positions import shared_positions


def by_loops(source: list[int], target: list[int]) -> list[tuple[int, int]]:
    pairs = []
    for byte in range(max([0, *source, *target]) + 1):
        last_source = last_target = None
        for i, end in enumerate(source):
            if end == byte:
                last_source = i
        for i, end in enumerate(target):
            if end == byte:
                last_target = i
        if last_source is not None and last_target is not None:
            pairs.append((last_source, last_target))
    return pairs


def test_shared_positions_against_loops() -> None:
    rng = random.Random(0)
    for _ in range(200):
        # Mostly rising, with repeats and unknown places, as samples have them.
        sides = []
        for _ in range(2):
            side = sorted(rng.choices(range(30), k=rng.randint(0, 25)))
            sides.append([-1 if rng.random() < 0.2 else end for end in side])
        source_at, target_at = shared_positions(*(np.array(side, dtype=np.int32) for side in sides))
        assert list(zip(source_at.tolist(), target_at.tolist(), strict=True)) == by_loops(*sides)
        assert source_at.dtype == target_at.dtype == np.int64
