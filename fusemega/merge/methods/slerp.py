"""Spherical interpolation of two models, tensor by tensor (Shoemake, 1985), a baseline of FuseChat v1."""

from __future__ import annotations

import math

import torch
from pydantic import Field

from fusemega.config import Section
from fusemega.merge.method import Block, Job, Merge, Method, Passes, register
from fusemega.merge.statistics import cell_sums, totals

PARALLEL = 0.9995


class SlerpSettings(Section):
    """Settings for a tensor."""

    t: float = Field(ge=0, le=1, description="0: the base; 1: the other model")


@register
class Slerp(Method):
    """With a the base's tensor, b the other model's, and omega the angle between them as flat vectors:

        theta = sin((1 - t) omega) / sin(omega) a + sin(t omega) / sin(omega) b

    Where |cos omega| > 0.9995, or one of them is zero, linear interpolation: (1 - t) a + t b. Fine-tuned variants of
    one base are mostly that close. FuseChat v1 gives t as gradients over the layers: [0, .5, .3, .7, 1] for self_attn,
    [1, .5, .7, .3, 0] for mlp, 0.5 elsewhere.
    """

    name = "slerp"
    only_two = True
    pass_names = ("norms and inner product",)
    vectors = (2, 0)

    Settings = SlerpSettings

    def passes(self, job: Job) -> Passes:
        """See `Method.passes`."""
        t = job.settings.t

        def products(block: Block) -> list[list[float]]:
            a, b = block.base, block.model(0)
            assert a is not None
            return [cell_sums(a * a), cell_sums(b * b), cell_sums(a * b)]

        aa, bb, ab = totals((yield products))
        cosine = max(-1.0, min(1.0, ab / math.sqrt(aa * bb))) if aa > 0 and bb > 0 else 1.0
        left, right = 1 - t, t
        if abs(cosine) <= PARALLEL:
            omega = math.acos(cosine)
            left, right = (math.sin(part * omega) / math.sin(omega) for part in (1 - t, t))

        def apply(block: Block) -> tuple[torch.Tensor, float]:
            assert block.base is not None
            return torch.mul(block.base, left).add_(block.model(0), alpha=right), 0.0

        return Merge(apply, {"coefficients": [right], "base_coefficient": left, "cosine": cosine})
