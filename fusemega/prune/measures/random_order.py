"""Blocks in a random order: what any measure has to be better than."""

from __future__ import annotations

import random
from collections.abc import Sequence

from fusemega.prune.order import ResidualBlock


def random_order(blocks: Sequence[ResidualBlock], seed: int) -> list[ResidualBlock]:
    """All blocks in the order that the seed draws, whatever order they come in."""
    return random.Random(seed).sample(sorted(blocks), len(blocks))
