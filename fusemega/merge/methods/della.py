"""DELLA: drop by magnitude, elect, fuse (Deep et al., 2024, arXiv:2406.11617).

Shape suffixes: R rows of a block, D elements of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field

from fusemega.merge.method import Block, Job, Merge, Method, Passes, register
from fusemega.merge.methods.dare import DareSettings, uniform
from fusemega.merge.methods.ties import DensitySettings, merge_by_sign


class DellaSettings(DareSettings):
    """Settings for a tensor."""

    normalize: bool = Field(
        True, description="divide each element by the sum of the weights of the models that take part in it"
    )


class WindowSettings(DensitySettings):
    """Settings for a model."""

    epsilon: float = Field(
        0.15, ge=0, lt=0.5, description="probabilities of being kept range from density - epsilon to density + epsilon"
    )


@register
class Della(Method):
    """MAGPRUNE, then TIES' election. In each row (last dimension, D long) of delta_j, r is the rank by magnitude from 0
    (smallest; ties by position) to D - 1, and

        p   = density_j - epsilon_j + 2 epsilon_j r / (D - 1)     the probability to be kept; density_j where D is 1;
                                                                  1 where density_j is: everything is kept
        d_j = delta_j Bernoulli(p) / p                            without `rescale` not divided

    merged as `Ties` merges its d_j. The width of the window is mergekit's convention for `epsilon`; the division by p
    is the paper's.
    """

    name = "della"
    whole_rows = True
    vectors = (4, 8)
    Settings = DellaSettings
    ModelSettings = WindowSettings

    def check(self, settings: Any, models: Sequence[Any]) -> None:
        """See `Method.check`."""
        for model in models:
            if model.density < 1 and (model.density - model.epsilon <= 0 or model.density + model.epsilon > 1):
                raise ValueError(f"density {model.density} -/+ epsilon {model.epsilon} must stay in (0, 1]")

    def passes(self, job: Job) -> Passes:
        """See `Method.passes`."""
        (tensor,) = job.tensors
        width = tensor.shape[-1] if tensor.shape else 1
        yield from ()  # asks for no pass, but makes this a generator

        def pruned(block: Block) -> list[torch.Tensor]:
            deltas = block.deltas()
            for number, (delta, model) in enumerate(zip(deltas, job.models, strict=True)):
                keep = keep_probabilities(delta.view(-1, width), model.density, model.epsilon).flatten()
                random = uniform(job.seed, tensor, number, block.start, len(delta))
                delta.mul_(torch.lt(random, keep, out=random))
                if job.settings.rescale:
                    delta.div_(keep)
            return deltas

        apply = merge_by_sign(pruned, [model.weight for model in job.models], job.settings)
        pairs = sum(round(model.density * tensor.elements) for model in job.models)
        return Merge(apply, {"selected": [model.density for model in job.models]}, pairs=pairs)


def keep_probabilities(delta_RD: torch.Tensor, density: float, epsilon: float) -> torch.Tensor:
    """fp32 [R, D]; see `Della`."""
    width = delta_RD.shape[1]
    if width == 1 or density == 1:
        return torch.full_like(delta_RD, density, dtype=torch.float32)
    steps = torch.linspace(density - epsilon, density + epsilon, width).expand(delta_RD.shape)
    order = delta_RD.abs().argsort(dim=1, stable=True)
    return torch.empty_like(delta_RD, dtype=torch.float32).scatter_(1, order, steps)
