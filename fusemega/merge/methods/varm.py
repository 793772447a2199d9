"""VaRM: weights from the variation ratio (FuseChat v1, Wan et al., 2024, arXiv:2402.16107, equation 7)."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

import torch
from pydantic import Field

from fusemega.config import Section
from fusemega.merge.method import Block, Job, Merge, Method, Passes, register
from fusemega.merge.signs import ratio
from fusemega.merge.statistics import CELL, cell_sums, shares, totals

_LAYER = re.compile(r".*\blayers\.\d+\.")


class VarmSettings(Section):
    """Settings for a tensor."""

    granularity: Literal["matrix", "layer", "model", "parameter"] = Field(
        "matrix", description="what shares one weight W_j"
    )


@register
class Varm(Method):
    """W_j = mean(delta_j^2) / sum_i mean(delta_i^2); theta = sum_j W_j theta_j. Equal weights if all deltas are zero.

    The mean is over one tensor (`matrix`, the paper's choice), all tensors of a layer (`layer`; tensors outside the
    layers each by themselves), the whole model (`model`), or one element (`parameter`, which the paper reports to
    collapse). Means are over elements. (The authors' script averages the tensors' means for layers and models, and
    reads one model's statistics for all of them, which makes its weights equal.)
    """

    name = "varm"
    pass_names = ("sums of squares",)
    vectors = (2, 1)

    Settings = VarmSettings

    def group(self, tensor: str, settings: Any) -> str:
        """See `Method.group`."""
        if settings.granularity == "model":
            return "model"
        layer = _LAYER.match(tensor)
        return layer[0] if layer and settings.granularity == "layer" else tensor

    def measures(self, settings: Any) -> tuple[str, ...]:
        """See `Method.measures`."""
        return () if settings.granularity == "parameter" else self.pass_names

    def remembered_bytes(self, elements: int, models: int) -> int:
        """See `Method.remembered_bytes`: a Python number for each cell of all tensors that are merged together."""
        return elements // CELL * models * 32

    def passes(self, job: Job) -> Passes:
        """See `Method.passes`."""
        if job.settings.granularity == "parameter":
            return Merge(_by_element)
        squares = totals((yield lambda block: [cell_sums(delta.square_()) for delta in block.deltas()]))
        weights = shares(squares)

        def apply(block: Block) -> tuple[torch.Tensor, float]:
            out = block.zeros()
            for number, weight in enumerate(weights):
                out.add_(block.delta(number), alpha=weight)
            return block.plus_base(out), 0.0

        rms = [math.sqrt(square / job.elements) for square in squares]
        return Merge(apply, {"coefficients": weights, "delta_rms": rms})


def _by_element(block: Block) -> tuple[torch.Tensor, float]:
    """base + sum_j d_j^3 / sum_j d_j^2."""
    cubes = block.zeros(torch.float64)  # a small delta's cube is below fp32
    squares = torch.zeros_like(cubes)
    for delta in block.deltas():
        wide = delta.double()
        square = wide * wide
        squares.add_(square)
        cubes.add_(square.mul_(wide))
    return block.plus_base(ratio(cubes, squares).to(block.dtype)), 0.0
