"""What may be removed next, so that the search can still end as its constraint asks.

`plain`: after all K removals the kept blocks, in the order of the stream, are attention, MLP, attention, MLP, ... Each
such pair is one ordinary layer, whatever layers its halves come from, so the result is an ordinary model.

Blocks that take turns so are removed two neighbours at a time: a layer, or an MLP with the attention behind it. They
take turns again afterwards, and every set of blocks that may be left is reached in this way. Removed one by one, the
cheap blocks would go first, mostly attention, and then dear neighbours would have to follow.

A model that lacks blocks may begin otherwise. Its blocks go one by one until they take turns. Let the kept blocks be a
word over a (attention) and m (MLP), of length n, with r removals left. The word (am)^p can be left after exactly r
removals if and only if n - r = 2p and (am)^p is a subsequence of the word. If (am)^q is the longest such subsequence,
which a scan from the left finds, then every p <= q is possible. So n - r is even, at least 2 (a model has a layer), and
at most 2q.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal

from fusemega.errors import UserError
from fusemega.prune.order import KINDS, OrderType, Removal, ResidualBlock

Constraint = Literal["none", "plain"]


def most_pairs(kept: Iterable[ResidualBlock]) -> int:
    """The largest number of pairs (attention, then MLP) that the blocks, which come in the order of the stream, can be
    reduced to by leaving some out.

    Example:
        >>> most_pairs([ResidualBlock("mlp", 0), ResidualBlock("mha", 1), ResidualBlock("mha", 2),
        ...     ResidualBlock("mlp", 2)])
        1
    """
    taken = 0
    for block in kept:
        if block.kind == KINDS[taken % 2]:
            taken += 1
    return taken // 2


def can_end_plain(kept: Sequence[ResidualBlock], left: int) -> bool:
    """Whether some `left` further removals leave pairs of an attention and an MLP block, at least one.

    Args:
        kept: the kept blocks, in the order of the stream.
    """
    length = len(kept) - left
    return length >= 2 and length % 2 == 0 and length <= 2 * most_pairs(kept)


def removable(kept: Sequence[ResidualBlock], order_type: OrderType, constraint: Constraint, left: int) -> list[Removal]:
    """What may be removed next: single blocks in the reference's order, attention blocks by layer, then MLPs; or pairs
    of neighbours, layers first.

    Args:
        kept: the kept blocks, in the order of the stream.
        left: blocks that are still to be removed.
    """
    if constraint == "plain" and can_end_plain(kept, 0):
        return sorted(pairwise(kept))
    allowed = [block for block in kept if order_type in ("mix", block.kind)]
    if constraint == "plain":
        allowed = [b for b in allowed if can_end_plain([other for other in kept if other != b], left - 1)]
    return [(block,) for block in sorted(allowed)]  # by kind, "mha" first, then by layer


def check_count(
    blocks: Sequence[ResidualBlock], count: int, order_type: OrderType, constraint: Constraint, where: str
) -> None:
    """Refuses a number of removals that the model, or the constraint, does not allow.

    Raises:
        UserError: says which numbers are allowed.
    """
    allowed = _counts(blocks, order_type, constraint)
    if count in allowed:
        return
    of = {"mix": "", "mha": "attention ", "mlp": "MLP "}[order_type]
    number = sum(order_type in ("mix", block.kind) for block in blocks)
    if constraint == "plain":
        shown = f"{allowed[0]}, {allowed[1]}, ... {allowed[-1]}" if len(allowed) > 3 else ", ".join(map(str, allowed))
        raise UserError(
            f"blocks: {count} of the {number} {of}blocks of {where} cannot be removed with constraint: plain, which "
            f"leaves pairs of an attention and an MLP block; allowed: {shown or 'none'}"
        )
    raise UserError(f"blocks: {count}, and {where} has {number} {of}blocks; allowed: 1 to {allowed[-1]}")


def _counts(blocks: Sequence[ResidualBlock], order_type: OrderType, constraint: Constraint) -> Sequence[int]:
    if constraint == "plain":
        return [count for count in range(1, len(blocks)) if can_end_plain(blocks, count)]
    number = sum(order_type in ("mix", block.kind) for block in blocks)
    return range(1, number + (number < len(blocks)))  # a model keeps a block
