"""How many pairs of two kinds are trained on together: the larger kind is sampled down.

The paper trains the reward model on pseudo-pairs and on earlier pairs that the reward model ranked, and does not say in
which ratio. Here it is 1:1 unless asked otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from fusemega.selection.protocol import place_in_order


def mixed_counts(pseudo: int, ranked: int, ratio: float | None) -> tuple[int, int]:
    """How many of `pseudo` and of `ranked` pairs are taken.

    Args:
        pseudo, ranked: how many there are.
        ratio: ranked pairs for each pseudo-pair; None: all of both; 0: no ranked ones.

    >>> mixed_counts(100, 30, 1.0), mixed_counts(100, 300, 1.0), mixed_counts(100, 300, 2.0), mixed_counts(5, 7, None)
    ((30, 30), (100, 100), (100, 200), (5, 7))
    """
    if ratio is None or not ranked or not pseudo:
        return pseudo, ranked
    if ratio == 0:
        return pseudo, 0
    # At least one of each; 3 times 1/3 is 1, also in floating point.
    taken = max(1, math.floor(ranked / ratio + 1e-9)), max(1, math.floor(pseudo * ratio + 1e-9))
    return min(pseudo, taken[0]), min(ranked, taken[1])


def sampled_down(keys: Iterable[str], count: int, seed: int) -> list[str]:
    """The first `count` keys in the order of the seed, in that order."""
    return sorted(keys, key=lambda key: (place_in_order(seed, key), key))[:count]
