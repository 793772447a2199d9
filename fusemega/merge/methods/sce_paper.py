"""SCE as its paper describes it (arXiv:2408.07990, section 3.3)."""

from __future__ import annotations

import torch

from fusemega.merge.method import Block, Job, Merge, Passes, register
from fusemega.merge.methods.sce import Sce, erase, merge_selected, select_squares, share_selected
from fusemega.merge.statistics import shares


@register
class ScePaper(Sce):
    """As `Sce`, but the selection also decides what is merged, and the sum is task arithmetic's: with d_j = delta_j
    on S and 0 elsewhere, and m_j from the sign of sum_i d_i,

        theta = base + sum_j eta_j m_j d_j
    """

    name = "sce_paper"

    def passes(self, job: Job) -> Passes:
        """See `Method.passes`."""
        selection, squares = yield from select_squares(job)
        eta = shares(squares)

        def apply(block: Block) -> tuple[torch.Tensor, float]:
            # Without the sum of coefficients, because nothing is divided by it.
            return merge_selected(block, selection, lambda deltas: erase(deltas, eta)[::2])

        selected = share_selected(job, selection)
        return Merge(apply, {"coefficients": eta, "selected": selected}, round(selected * job.elements) * len(eta))
