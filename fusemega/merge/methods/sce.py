"""SCE: select, calculate, erase (FuseChat v2, Wan et al., 2024, arXiv:2408.07990), as the authors' code merges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pydantic import Field

from fusemega.config import Section
from fusemega.merge.method import Block, Job, Merge, Method, Passes, PassesFor, register
from fusemega.merge.select import PASS_NAMES, Keys, Selection, select_largest, selection_bytes
from fusemega.merge.signs import agreeing_sums, elect, ratio
from fusemega.merge.statistics import cell_sums, shares, totals

LEAST_VARIANCE = 2.0**-100


class SceSettings(Section):
    """Settings for a tensor."""

    select_topk: float = Field(1.0, ge=0, le=1, description="tau: share of the differing elements that is selected")


@register
class Sce(Method):
    """With D_e the deltas of all K models at element e, per tensor:

        select     S = the int(tau n') elements of largest population variance of D_e; n' of them are not zero.
                   At tau = 1 it is all elements, those whose deltas are equal (of variance zero) too
        calculate  eta_j = sum over S of delta_j^2 / sum_i sum over S of delta_i^2; equal where that is 0
        erase      m_j = 1 where delta_j has the sign of sum_i delta_i (zero counts as +), else 0
        merge      theta = base + sum_j eta_j m_j delta_j / sum_j eta_j m_j   (a sum of 0 is 1)

    The selection decides the coefficients only: every element is merged. This is what the authors' fork of mergekit
    computes, and so most likely what FuseChat-7B-v2.0 (tau 0.1) and FuseO1 (tau 1.0) are. `sce_paper` is what the paper
    describes, `sce_mergekit` what mergekit's `sce` computes.
    """

    name = "sce"
    pass_names = (*PASS_NAMES, "sums of squares over the selection")
    vectors = (5, 1)
    Settings = SceSettings

    def measures(self, settings: Any) -> tuple[str, ...]:
        """See `Method.measures`."""
        return self.pass_names if settings.select_topk < 1 else self.pass_names[-1:]

    def remembered_bytes(self, elements: int, models: int) -> int:
        """See `Method.remembered_bytes`: two marks an element."""
        return selection_bytes(elements, streams=1) + elements // 4

    def passes(self, job: Job) -> Passes:
        """See `Method.passes`."""
        selection, squares = yield from select_squares(job)
        eta = shares(squares)

        def apply(block: Block) -> tuple[torch.Tensor, float]:
            merged, share, agreed = erase(block.deltas(), eta)
            return block.plus_base(ratio(merged, share)), agreed

        pairs = job.elements * len(eta)
        return Merge(apply, {"coefficients": eta, "selected": share_selected(job, selection)}, pairs)


def select_squares(job: Job) -> PassesFor[tuple[Selection | None, list[float]]]:
    """The selection (None: all elements), and for each model the sum of its squared deltas there."""
    selection = None if job.settings.select_topk == 1 else (yield from select(job))

    def squares(block: Block) -> list[list[float]]:
        if selection is None:
            return [cell_sums(delta.square_()) for delta in block.deltas()]
        return selected_squares(block, selection)

    squares_of_blocks = yield squares
    return selection, totals(squares_of_blocks)


def share_selected(job: Job, selection: Selection | None) -> float:
    """The share of a job's elements that is selected."""
    return 1.0 if selection is None else selection.count / job.elements


def select(job: Job) -> PassesFor[Selection]:
    """The selection of `Sce` below tau = 1; equal variances are taken in the order of the flat tensor."""
    tau, count = job.settings.select_topk, len(job.models)
    slack = 4 * count * (count + 2) * 2.0**-24
    keys = Keys(lambda block: iter([rough_variance(block)]), variance_at, slack)
    (selection,) = yield from select_largest(job, keys, lambda nonzero: [int(tau * nonzero)])
    return selection


def rough_variance(block: Block) -> torch.Tensor:
    """K times the population variance over the models, fp32 [n], relatively within 4 K (K + 2) 2^-24.

    Taken from differences to the first model, e_j, of which at most K - 1 are not zero: sum e_j^2 - (sum e_j)^2 / K
    then loses at most a factor K to cancellation. Below `LEAST_VARIANCE`, where squares near the end of fp32's range,
    it is zero.
    """
    sums, squares = block.zeros(), block.zeros()
    models = block.models()
    first = next(models)
    for model in models:
        difference = torch.sub(model, first)
        sums.add_(difference)
        squares.addcmul_(difference, difference)
    rough = squares.addcmul_(sums, sums, value=-1 / len(block.stored)).float()
    return torch.nn.functional.hardshrink(rough, LEAST_VARIANCE)


def variance_at(block: Block, stream: int, places: np.ndarray) -> np.ndarray:
    """The same at some places, in fp64, rounded to fp32: models in another order give the same bits."""
    first, *others = (model.numpy().astype(np.float64) for model in block.at(places).models())
    sums, squares = np.zeros_like(first), np.zeros_like(first)
    for model in others:
        difference = model - first
        sums += difference
        squares += difference * difference
    count = len(block.stored)
    variance = ((count * squares - sums * sums) / count).astype(np.float32)
    return np.where(variance > LEAST_VARIANCE, variance, np.float32(0))


def selected_squares(block: Block, selection: Selection) -> list[list[float]]:
    """For each model, the cell sums of the squared deltas of the selected elements."""
    places = selection.places(block)
    selected = block.at(places)
    squares = block.zeros()
    out = []
    for number in range(len(block.stored)):
        squares.numpy()[places] = selected.delta(number).square_()
        out.append(cell_sums(squares))
    return out


def merge_selected(
    block: Block, selection: Selection | None, merge: Callable[[list[torch.Tensor]], tuple[torch.Tensor, float]]
) -> tuple[torch.Tensor, float]:
    """What `Merge.apply` returns, for methods in which elements that are not selected become the base's.

    Args:
        block: the block.
        selection: the selection of its job; None: all elements.
        merge: the deltas of the selected elements, K times [m], which it may overwrite -> the merged delta [m], agreed.
    """
    assert block.base is not None
    if selection is None:
        merged, agreed = merge(block.deltas())
        return block.plus_base(merged), agreed
    places = selection.places(block)
    selected = block.at(places)
    merged, agreed = merge(selected.deltas())
    out = torch.add(block.base, 0.0)  # +0 where the base has -0, as the sum of base and delta
    out.numpy()[places] = selected.plus_base(merged)
    return out, agreed


def erase(deltas: list[torch.Tensor], eta: list[float]) -> tuple[torch.Tensor, torch.Tensor, float]:
    """`agreeing_sums` of eta_j delta_j under the sign of sum_j delta_j; the deltas are overwritten."""
    total = deltas[0].clone()
    for delta in deltas[1:]:
        total.add_(delta)
    return agreeing_sums(deltas, eta, elect(total))
