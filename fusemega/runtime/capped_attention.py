"""Attention with capped scores, as Gemma-2 has it: softmax(cap * tanh(q k^T * scale / cap)) v.

Neither torch's fused attention nor Transformer Engine's has the cap. Here the scores of one block of queries exist at a
time, in fp32 or wider; backward computes them again, so nothing of the size [queries, keys] is kept.

Shape suffixes: B batch, N query heads, G key/value heads, R = N / G query heads of one of them, S queries, K keys, D
head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def capped_attention(
    query_BNSD: Tensor, key_BGKD: Tensor, value_BGKD: Tensor, mask_SK: Tensor, scale: float, cap: float
) -> Tensor:
    """[B, N, S, D] in the dtype of the operands.

    Args:
        query_BNSD: N is a multiple of G.
        key_BGKD, value_BGKD: as many keys as the mask has columns.
        mask_SK: bool; each query sees the keys where it is true, at least one.
        scale: of the products of queries and keys.
        cap: > 0; scores become cap * tanh(scores / cap).
    """
    out: Tensor = _CappedAttention.apply(query_BNSD, key_BGKD, value_BGKD, mask_SK, scale, cap)
    return out


class _CappedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask_SK: Tensor, scale: float, cap: float) -> Any:
        ctx.save_for_backward(query, key, value, mask_SK)
        ctx.scale, ctx.cap = scale, cap
        weights, _ = _weights(_grouped(query, key.size(1)), key, mask_SK, scale, cap)
        return _product(weights, value).to(query.dtype).view(query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        """With p the weights, t the tanh and dp = d_out v^T: d_scores = p (dp - sum(dp p)) (1 - t^2)."""
        query, key, value, mask_SK = ctx.saved_tensors
        query_BGQD, d_out_BGQD = (_grouped(t, key.size(1)) for t in (query, d_out))
        weights, tanh = _weights(query_BGQD, key, mask_SK, ctx.scale, ctx.cap)
        d_value = _product(weights.transpose(2, 3), d_out_BGQD)
        slope = _product(d_out_BGQD, value.transpose(2, 3))
        slope.sub_((slope * weights).sum(3, keepdim=True)).mul_(weights)
        slope.mul_(tanh.square_().neg_().add_(1.0)).mul_(ctx.scale)
        d_query, d_key = _product(slope, key), _product(slope.transpose(2, 3), query_BGQD)
        gradients = (d_query.view(query.shape), d_key, d_value)
        return *(gradient.to(query.dtype) for gradient in gradients), None, None, None


def _grouped(t_BNSD: Tensor, groups: int) -> Tensor:
    """[B, G, R * S, D]: the queries of the heads that share a key/value head, head after head."""
    batch, heads, length, size = t_BNSD.shape
    return t_BNSD.reshape(batch, groups, heads // groups * length, size)


def _weights(query_BGQD: Tensor, key_BGKD: Tensor, mask_SK: Tensor, scale: float, cap: float) -> tuple[Tensor, Tensor]:
    """What each query takes of each key, and the tanh of its score, both [B, G, R * S, K], in fp32 or wider."""
    tanh = _product(query_BGQD, key_BGKD.transpose(2, 3)).mul_(scale / cap).tanh_()
    scores = tanh * cap
    scores.unflatten(2, (-1, len(mask_SK))).masked_fill_(~mask_SK, -torch.inf)
    return torch.softmax(scores, dim=3), tanh


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in fp32 or wider. Of operands in half precision a GPU sums in fp32; a CPU widens them."""
    narrow = min((left.dtype, right.dtype), key=lambda dtype: dtype.itemsize)
    wide = torch.promote_types(narrow, torch.float32)
    if wide == narrow or not left.is_cuda:
        return left.to(wide) @ right.to(wide)
    batch, groups = left.shape[:2]
    flat = torch.bmm(left.to(narrow).flatten(0, 1), right.to(narrow).flatten(0, 1), out_dtype=wide)
    return flat.unflatten(0, (batch, groups))
