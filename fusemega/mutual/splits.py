"""Prompts divided into portions that share none: for each policy, for each reward model, and to compare policies on.

The order of the seed decides (`selection.protocol.place_in_order`), and nothing else: not the order of the rows. The
paper has two portions for policies and one for a reward model, of equal size, and compares policies on 2,000 prompts.
Whether these are among the others is not known here; in this project they are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fusemega.errors import UserError
from fusemega.selection.protocol import place_in_order

SELECTION = "selection"
"""The portion on which policies are compared."""


def portion_sizes(
    total: int, policies: int, rewards: int, selection: int, policy: int | None = None, reward: int | None = None
) -> dict[str, int]:
    """Name -> prompts of each portion: `selection`, `policy-1` ..., `reward-1` ...

    Args:
        total: different prompts.
        policies, rewards: how many portions of each kind.
        selection: prompts to compare policies on.
        policy, reward: prompts of a portion of the kind. Portions without a number share equally what is left; the
            first ones get what cannot be divided.

    Raises:
        UserError: too few prompts for that.

    >>> portion_sizes(11, policies=2, rewards=1, selection=2)
    {'selection': 2, 'policy-1': 3, 'policy-2': 3, 'reward-1': 3}
    """
    asked = {SELECTION: selection}
    asked |= {f"policy-{t}": policy or 0 for t in range(1, policies + 1)}
    asked |= {f"reward-{t}": reward or 0 for t in range(1, rewards + 1)}
    open_ones = [name for name, size in asked.items() if not size]
    left = total - sum(asked.values())
    if left < len(open_ones):
        least = sum(max(size, 1) for size in asked.values())
        parts = ", ".join(f"{name} {size or 'at least 1'}" for name, size in asked.items())
        raise UserError(f"splits: {total} prompts, and the portions need {least} or more ({parts})")
    for place, name in enumerate(open_ones):
        asked[name] = left // len(open_ones) + (place < left % len(open_ones))
    return asked


def split_keys(keys: Iterable[str], seed: int, sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """Portion -> keys of its prompts, in the order of the seed.

    Args:
        keys: of the prompts, each once.
        seed: decides which prompts go where.
        sizes: together no more than there are keys; the last prompts in the order are in no portion.
    """
    ordered = sorted(keys, key=lambda key: (place_in_order(seed, key), key))
    found, start = {}, 0
    for name, size in sizes.items():
        found[name], start = ordered[start : start + size], start + size
    return found
