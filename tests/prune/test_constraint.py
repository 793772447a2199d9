"""Which partial removals can still end in pairs: those that brute force can complete, and no others."""

from __future__ import annotations

import itertools

import pytest

from fusemega.errors import UserError
from fusemega.prune.constraint import can_end_plain, check_count, removable
from fusemega.prune.order import KINDS, ResidualBlock


def _complete(layers: int) -> list[ResidualBlock]:
    return [ResidualBlock(kind, layer) for layer in range(layers) for kind in KINDS]


def _plain(kept: tuple[ResidualBlock, ...]) -> bool:
    return len(kept) >= 2 and [block.kind for block in kept] == ["mha", "mlp"] * (len(kept) // 2)


def test_as_brute_force_says() -> None:
    for layers in (1, 2, 3, 4):
        blocks = _complete(layers)
        for number in range(1, len(blocks) + 1):
            for kept in itertools.combinations(blocks, number):
                for left in range(number + 1):
                    possible = any(_plain(end) for end in itertools.combinations(kept, number - left))
                    assert can_end_plain(kept, left) == possible, (kept, left)


def test_single_blocks_are_removed_until_the_rest_takes_turns() -> None:
    kept = [block for block in _complete(3) if block != ResidualBlock("mha", 1)]  # a m m a m, of 3 layers
    assert removable(kept, "mix", "plain", 1) == [(ResidualBlock("mlp", 0),), (ResidualBlock("mlp", 1),)]
    assert removable(kept, "mix", "plain", 3) == [(block,) for block in sorted(kept)]
    assert removable(kept, "mha", "none", 1) == [(ResidualBlock("mha", 0),), (ResidualBlock("mha", 2),)]


def test_neighbours_are_removed_together_and_reach_every_end() -> None:
    blocks = _complete(4)
    pairs = removable(blocks, "mix", "plain", 2)
    assert pairs[0] == (ResidualBlock("mha", 0), ResidualBlock("mlp", 0))
    assert pairs[4] == (ResidualBlock("mlp", 0), ResidualBlock("mha", 1)) and len(pairs) == 7
    for count in (2, 4, 6):
        reached = {tuple(blocks)}
        for left in range(count, 0, -2):
            reached = {
                tuple(block for block in kept if block not in pair)
                for kept in reached
                for pair in removable(kept, "mix", "plain", left)
            }
        assert reached == {end for end in itertools.combinations(blocks, 8 - count) if _plain(end)}


def test_numbers_that_cannot_be_removed() -> None:
    blocks = _complete(3)
    for count, kind in ((5, "mix"), (3, "mha"), (3, "mlp")):
        check_count(blocks, count, kind, "none", "m")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="blocks: 6, and m has 6 blocks; allowed: 1 to 5"):
        check_count(blocks, 6, "mix", "none", "m")
    with pytest.raises(UserError, match="blocks: 4, and m has 3 attention blocks; allowed: 1 to 3"):
        check_count(blocks, 4, "mha", "none", "m")
    check_count(blocks, 4, "mix", "plain", "m")
    with pytest.raises(
        UserError, match="3 of the 6 blocks of m cannot be removed with constraint: plain.*allowed: 2, 4"
    ):
        check_count(blocks, 3, "mix", "plain", "m")
