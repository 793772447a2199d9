"""Splits rows over context-parallel ranks in zigzag order, and joins them again.

Every segment of a packed row is cut into 2 x CP pieces of equal length; rank r holds pieces r and 2 CP - 1 - r, so that
under causal attention all ranks have equal work. The same split as Transformer Engine's and megatron-core's
(models/common/embeddings/rope_utils.py:129).

Shape suffixes: T tokens of the whole row, segments + 1 bounds in cu_seqlens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def zigzag(cu_seqlens: Tensor, rank: int, size: int) -> Tensor:
    """int64 [T / size]: the places of the row that `rank` of `size` holds, in its order, on the device of cu_seqlens.

    Raises:
        ValueError: a segment does not cut into 2 x size pieces.
    """
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    if bool((lengths % (2 * size)).any()):
        raise ValueError(f"segments of {lengths.tolist()} tokens are not all multiples of {2 * size}")
    # Token i of the result is token i - `before` of its piece, which begins at `begins` in the row.
    piece = lengths // (2 * size)
    begins = torch.stack([starts + rank * piece, starts + (2 * size - 1 - rank) * piece], dim=1).flatten()
    sizes = piece.repeat_interleave(2)
    before = sizes.cumsum(0) - sizes
    return (begins - before).repeat_interleave(sizes) + torch.arange(int(sizes.sum()), device=cu_seqlens.device)


def gather_row(part: Tensor, order: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The whole row [T, ...] in its own order, from every rank's [T / CP, ...]. Collective.

    Backward sums the gradients that the ranks have for each token, and gives each rank those of its own.

    Args:
        part: this rank's.
        order: int64 [T], the place in the row of the i-th token, ranks one after the other.
        group: the ranks that share the row.
    """
    whole: Tensor = _GatherRow.apply(part, order, group)
    return whole


class _GatherRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, order: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.order, ctx.group = order, group
        gathered = part.new_empty(len(order), *part.shape[1:])
        dist.all_gather_into_tensor(gathered, part.contiguous(), group=group)
        whole = torch.empty_like(gathered)
        whole[order] = gathered
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        part = gradient.new_empty(len(ctx.order) // ctx.group.size(), *gradient.shape[1:])
        dist.reduce_scatter_tensor(part, gradient[ctx.order], group=ctx.group)
        return part, None, None


def sum_over_context(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of the ranks' values, on each of them. Collective. Backward: the gradient itself.

    For a quantity of whole sequences whose tokens are spread over the ranks: every rank then computes the same loss,
    whose gradient each passes to its own tokens alone; summed over ranks, as parameters' gradients are, it counts once.
    """
    total: Tensor = _SumOverContext.apply(value, group)
    return total


class _SumOverContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return gradients[0], None
