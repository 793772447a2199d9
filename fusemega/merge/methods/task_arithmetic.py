"""Task arithmetic (Ilharco et al., 2023, arXiv:2212.04089)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field

from fusemega.config import Section
from fusemega.merge.method import Block, Job, Merge, Method, Passes, register
from fusemega.merge.methods.linear import check_sum


class ArithmeticSettings(Section):
    """Settings of every method that adds up weighted deltas."""

    normalize: bool = Field(False, description="divide by the sum of the weights of the models that take part")
    scale: float = Field(1.0, alias="lambda", allow_inf_nan=False, description="multiplies the merged delta")


class WeightSettings(Section):
    """Settings for a model."""

    weight: float = Field(allow_inf_nan=False, description="weight of the model")


@register
class TaskArithmetic(Method):
    """theta = base + lambda sum_j w_j delta_j, divided by sum_j w_j with `normalize`. FuseChat v2: weights of 0.3."""

    name = "task_arithmetic"
    vectors = (2, 0)
    Settings = ArithmeticSettings
    ModelSettings = WeightSettings

    def check(self, settings: Any, models: Sequence[Any]) -> None:
        """See `Method.check`."""
        check_sum(settings.normalize, [model.weight for model in models])

    def passes(self, job: Job) -> Passes:
        """See `Method.passes`."""
        weights = [model.weight for model in job.models]
        factor = job.settings.scale / (math.fsum(weights) if job.settings.normalize else 1.0)
        coefficients = [factor * weight for weight in weights]
        yield from ()  # asks for no pass, but makes this a generator

        def apply(block: Block) -> tuple[torch.Tensor, float]:
            out = block.zeros()
            for number, coefficient in enumerate(coefficients):
                out.add_(block.delta(number), alpha=coefficient)
            return block.plus_base(out), 0.0

        return Merge(apply, {"coefficients": coefficients})
