"""SCE as its paper describes it (arXiv:2408.07990, section 3.3)."""

from __future__ import annotations

import torch

from fusemega.merge.method import Block, Job, Merge, Passes, register
from fusemega.merge.methods.sce import Sce, erase, merge_selected, select, selected_squares
from fusemega.merge.statistics import shares, totals


@register
class ScePaper(Sce):
    """As `Sce`, but the selection also decides what is merged, and the sum is task arithmetic's: with d_j = delta_j
    on S and 0 elsewhere, and m_j from the sign of sum_i d_i,

        theta = base + sum_j eta_j m_j d_j
    """

    name = "sce_paper"

    def passes(self, job: Job) -> Passes:
        """See `Method.passes`."""
        selection = yield from select(job)
        eta = shares(totals((yield lambda block: selected_squares(block, selection))))

        def apply(block: Block) -> tuple[torch.Tensor, float]:
            return merge_selected(block, selection, lambda deltas: erase(deltas, eta)[::2])

        report = {"coefficients": eta, "selected": selection.count / job.elements}
        return Merge(apply, report, pairs=selection.count * len(eta))
