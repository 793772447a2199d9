"""SCE as mergekit's `sce` computes it, to reproduce its merges."""

from __future__ import annotations

import math

import torch

from fusemega.merge.method import Block, Job, Merge, Passes, register
from fusemega.merge.methods.sce import Sce, erase, merge_selected, select_squares, share_selected
from fusemega.merge.statistics import shares

LEAST_TOTAL = 1e-6
LEAST_DIVISOR = 1e-6


@register
class SceMergekit(Sce):
    """With d_j = delta_j on S (of `Sce`) and 0 elsewhere; n elements in the tensor:

        eta_j = mean(d_j^2) / sum_i mean(d_i^2), but equal where that sum is below 1e-6
        m_j   = 1 where d_j has the sign of sum_i d_i (zero counts as +), else 0
        theta = base + sum_j eta_j m_j d_j / max(sum_j eta_j m_j, 1e-6)

    The floor of 1e-6 makes the coefficients equal for deltas of an rms below about 4e-4, that is, for most
    fine-tunes: of select, calculate and erase, the second is silently left out. `sce` has no floor.
    """

    name = "sce_mergekit"

    def passes(self, job: Job) -> Passes:
        """See `Method.passes`."""
        selection, squares = yield from select_squares(job)
        below = math.fsum(squares) / job.elements < LEAST_TOTAL
        eta = [1 / len(squares)] * len(squares) if below else shares(squares)

        def merged(deltas: list[torch.Tensor]) -> tuple[torch.Tensor, float]:
            total, share, agreed = erase(deltas, eta)
            return total.div_(share.clamp_(min=LEAST_DIVISOR)), agreed

        def apply(block: Block) -> tuple[torch.Tensor, float]:
            return merge_selected(block, selection, merged)

        selected = share_selected(job, selection)
        return Merge(apply, {"coefficients": eta, "selected": selected}, round(selected * job.elements) * len(eta))
