"""SCE: select, calculate, erase (FuseChat v2, Wan et al., 2024, arXiv:2408.07990), as the authors' code merges."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from pydantic import Field

from fusemega.config import Section
from fusemega.merge.method import Block, Job, Merge, Method, Pass, Passes, register
from fusemega.merge.select import PASS_NAMES, Selection, select_largest
from fusemega.merge.signs import agreeing_sums, elect, ratio
from fusemega.merge.statistics import cell_sums, shares, totals


class SceSettings(Section):
    """Of a tensor."""

    select_topk: float = Field(1.0, ge=0, le=1, description="tau: share of the elements that differ which is selected")


@register
class Sce(Method):
    """With D_e the deltas of all K models at element e, per tensor:

        select     S = the int(tau n') elements of largest population variance of D_e; n' of them are not zero
        calculate  eta_j = sum over S of delta_j^2 / sum_i sum over S of delta_i^2; equal where that is 0
        erase      m_j = 1 where delta_j has the sign of sum_i delta_i (zero counts as +), else 0
        merge      theta = base + sum_j eta_j m_j delta_j / sum_j eta_j m_j   (a sum of 0 is 1)

    The selection decides the coefficients only: every element is merged. This is what the authors' fork of mergekit
    computes, and so most likely what FuseChat-7B-v2.0 (tau 0.1) and FuseO1 (tau 1.0) are. `sce_paper` is what the paper
    describes, `sce_mergekit` what mergekit's `sce` computes.
    """

    name = "sce"
    pass_names = (*PASS_NAMES, "sums of squares over the selection")
    vectors = (4, 2)
    Settings = SceSettings

    def passes(self, job: Job) -> Passes:
        """See `Method.passes`."""
        selection = yield from select(job)
        squares = totals((yield lambda block: selected_squares(block, selection)))
        eta = shares(squares)

        def apply(block: Block) -> tuple[torch.Tensor, float]:
            merged, share, agreed = erase(block.deltas(), eta)
            return block.plus_base(ratio(merged, share)), agreed

        pairs = job.elements * len(eta)
        return Merge(apply, {"coefficients": eta, "selected": selection.count / job.elements}, pairs)


def select(job: Job) -> Generator[Pass, list[Any], Selection]:
    """The selection of `Sce`. Variances are computed in fp64 from sums, where equal deltas in another order give the
    same bits, and ranked in fp32; equal ones are taken in the order of the flat tensor."""
    tau = job.settings.select_topk
    (selection,) = yield from select_largest(
        lambda block: [variance(block.deltas())], lambda nonzero: [int(tau * nonzero)]
    )
    return selection


def variance(deltas: list[torch.Tensor]) -> torch.Tensor:
    """K times the population variance over the models, fp32 [n]."""
    sums = torch.zeros_like(deltas[0], dtype=torch.float64)
    squares = torch.zeros_like(sums)
    for delta in deltas:
        wide = delta.double()
        sums.add_(wide)
        squares.addcmul_(wide, wide)
    return squares.addcmul_(sums, sums, value=-1 / len(deltas)).clamp_(min=0).float()


def selected_squares(block: Block, selection: Selection) -> list[list[float]]:
    """For each model, the cell sums of the squared deltas of the selected elements."""
    deltas = block.deltas()
    mask = selection.mask(block, variance(deltas))
    return [cell_sums(delta.mul_(mask).square_()) for delta in deltas]


def erase(deltas: list[torch.Tensor], eta: list[float]) -> tuple[torch.Tensor, torch.Tensor, float]:
    """`agreeing_sums` of eta_j delta_j under the sign of sum_j delta_j; the deltas are overwritten."""
    total = deltas[0].clone()
    for delta in deltas[1:]:
        total.add_(delta)
    for delta, weight in zip(deltas, eta, strict=True):
        delta.mul_(weight)
    return agreeing_sums(deltas, eta, elect(total))
