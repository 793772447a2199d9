"""Weighted average of the models themselves (Wortsman et al., 2022, arXiv:2203.05482)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field

from fusemega.config import Section
from fusemega.merge.method import Block, Job, Merge, Method, Passes, register


class LinearSettings(Section):
    """Settings for a tensor."""

    normalize: bool = Field(True, description="divide by the sum of the weights; without it they must sum to 1")


class EqualWeightSettings(Section):
    """Settings for a model."""

    weight: float = Field(1.0, allow_inf_nan=False, description="weight of the model")


@register
class Linear(Method):
    """theta = sum_j w_j theta_j / sum_j w_j. A base takes no part, unless it is listed among the models."""

    name = "linear"
    needs_base = False
    vectors = (1, 0)

    Settings = LinearSettings
    ModelSettings = EqualWeightSettings

    def check(self, settings: Any, models: Sequence[Any]) -> None:
        """See `Method.check`."""
        check_sum(settings.normalize, [model.weight for model in models])
        total = math.fsum(model.weight for model in models)
        if not settings.normalize and not math.isclose(total, 1, abs_tol=1e-6):
            raise ValueError(f"the weights sum to {total:g}; without normalize they must sum to 1")

    def passes(self, job: Job) -> Passes:
        """See `Method.passes`."""
        weights = [model.weight for model in job.models]
        total = math.fsum(weights) if job.settings.normalize else 1.0
        coefficients = [weight / total for weight in weights]
        yield from ()  # asks for no pass, but makes this a generator

        def apply(block: Block) -> tuple[torch.Tensor, float]:
            first, *others = coefficients
            out = torch.mul(block.model(0), first)
            for number, coefficient in enumerate(others, 1):
                out.add_(block.model(number), alpha=coefficient)
            return out, 0.0

        return Merge(apply, {"coefficients": coefficients})


def check_sum(normalize: bool, weights: Sequence[float]) -> None:
    """Refuses weights that cannot be divided by their sum."""
    if normalize and not all(abs(weight) < 1e100 for weight in weights):
        raise ValueError(f"the weights {list(weights)}: normalize takes numbers below 1e100")
    if normalize and abs(math.fsum(weights)) < 1e-8:
        raise ValueError(f"the weights {list(weights)} sum to 0, and normalize divides by their sum")
