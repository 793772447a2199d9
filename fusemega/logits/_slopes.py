"""The gradient of a chunk's loss in its logits, block by block, from the gradients of its `SparseLogProbs`.

Shape suffixes: C tokens of a chunk, V this rank's real vocabulary rows, B rows of one vocabulary block, K entries of a
query.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusemega.logits._listed import Listed
from fusemega.logits._query import Query, SparseLogProbs, Sums

if TYPE_CHECKING:
    from fusemega.logits._head import ChunkedHead


def d_logits(
    head: ChunkedHead,
    logits_CV: Tensor,
    queries: Sequence[Query],
    state: Sequence[Sums],
    upstream: Sequence[SparseLogProbs],
    further_CV: Tensor | None,
) -> Iterator[tuple[slice, Tensor]]:
    """Block by block, d loss / d raw logits, in a buffer that the next block overwrites.

    With s = logit / T, p = softmax(s), r = softmax(s) over the ids not listed (times what is left of their weights),
    p^k = softmax(s) over the ids of entry k (times their weights), upstream gradients g_k, dlse, dr:

        ds_v = (dlse - sum_k g_k - dr) p_v + sum_k g_k p^k_v + dr r_v

    so that a listed id k gets g_k itself, and a group's gradient is shared by its members.
    """
    base: dict[float, tuple[Tensor, Tensor]] = {}  # temperature -> peak and the factor of exp((logit - peak) / T)
    residuals: list[tuple[Listed, Tensor, Tensor]] = []
    slopes: list[tuple[Listed, Tensor]] = []
    for listed, sums, grad in zip(head.listed(logits_CV, queries), state, upstream, strict=True):
        query = listed.query
        listed_CK = torch.where(query.ids_TK >= 0, grad.logp_TK, 0.0)
        share_C = grad.lse_T - listed_CK.sum(1)
        if query.residual:
            assert grad.log_residual_T is not None and sums.residual_sum_C is not None
            assert sums.residual_peak_C is not None
            some = sums.residual_sum_C > 0
            d_residual_C = torch.where(some, grad.log_residual_T, 0.0)
            share_C = share_C - d_residual_C
            factor_C = d_residual_C / torch.where(some, sums.residual_sum_C, 1.0) / query.temperature
            residuals.append((listed, sums.residual_peak_C, factor_C))
        factor_C = share_C / sums.sum_C / query.temperature
        if query.temperature in base:
            factor_C = factor_C + base[query.temperature][1]
        base[query.temperature] = (sums.peak_C, factor_C)
        slopes.append((listed, listed.slopes(grad.logp_TK, sums)))

    for block in head.blocks:
        logits_CB = logits_CV[:, block]
        wide, total_CB = head.scratch(logits_CB, 0)
        total_CB.zero_()
        for temperature, (peak_C, factor_C) in base.items():
            _, exp_CB = head.exponentials(logits_CB, peak_C, temperature, 1)
            total_CB.addcmul_(exp_CB, factor_C[:, None])
        for listed, peak_C, factor_C in residuals:
            other_wide, exp_CB = head.exponentials(logits_CB, peak_C, listed.query.temperature, 1)
            # A listed id may lie far above the residual's peak: exp is then inf, and is overwritten.
            listed.take_out(other_wide, block, logits=False)
            total_CB.addcmul_(exp_CB, factor_C[:, None])
        for listed, slope in slopes:
            listed.add(wide, block, slope)
        if further_CV is not None:
            total_CB.add_(further_CV[:, block])
        if head.softcap is not None:  # d cap tanh(x / cap) = 1 - tanh^2
            _, slope_CB = head.scratch(logits_CB, 1)
            torch.div(logits_CB, head.softcap, out=slope_CB).square_().neg_().add_(1.0)
            total_CB.mul_(slope_CB)
        yield block, total_CB
