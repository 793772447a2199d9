"""SCE as mergekit's `sce` computes it, for those who merged with it."""

from __future__ import annotations

import math
from typing import Any

import torch

from fusemega.merge.method import Block, Job, Merge, Passes, register
from fusemega.merge.methods.sce import Sce, erase, merge_selected, select, selected_squares
from fusemega.merge.statistics import cell_sums, shares, totals

LEAST_TOTAL = 1e-6
LEAST_DIVISOR = 1e-6


@register
class SceMergekit(Sce):
    """With d_j = delta_j on S (of `Sce`) and 0 elsewhere, everything at tau = 1; n elements in the tensor:

        eta_j = mean(d_j^2) / sum_i mean(d_i^2), but equal where that sum is below 1e-6
        m_j   = 1 where d_j has the sign of sum_i d_i (zero counts as +), else 0
        theta = base + sum_j eta_j m_j d_j / max(sum_j eta_j m_j, 1e-6)

    The floor of 1e-6 makes the coefficients equal for deltas of an rms below about 4e-4, that is, for most
    fine-tunes: of select, calculate and erase, the second is silently left out. `sce` has no floor.
    """

    name = "sce_mergekit"

    def measures(self, settings: Any) -> tuple[str, ...]:
        """See `Method.measures`."""
        return self.pass_names if settings.select_topk < 1 else self.pass_names[-1:]

    def passes(self, job: Job) -> Passes:
        """See `Method.passes`."""
        everything = job.settings.select_topk == 1
        if everything:
            squares = totals((yield lambda block: [cell_sums(delta.square_()) for delta in block.deltas()]))
        else:
            selection = yield from select(job)
            squares = totals((yield lambda block: selected_squares(block, selection)))
        below = math.fsum(squares) / job.elements < LEAST_TOTAL
        eta = [1 / len(squares)] * len(squares) if below else shares(squares)

        def merged(deltas: list[torch.Tensor]) -> tuple[torch.Tensor, float]:
            total, share, agreed = erase(deltas, eta)
            return total.div_(share.clamp_(min=LEAST_DIVISOR)), agreed

        def apply(block: Block) -> tuple[torch.Tensor, float]:
            if not everything:
                return merge_selected(block, selection, merged)
            delta, agreed = merged(block.deltas())
            return block.plus_base(delta), agreed

        selected = 1.0 if everything else selection.count / job.elements
        pairs = round(selected * job.elements) * len(eta)
        return Merge(apply, {"coefficients": eta, "selected": selected}, pairs)
