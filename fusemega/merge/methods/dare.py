"""DARE: drop and rescale (Yu et al., 2024, arXiv:2311.03099), then add up, or elect signs as TIES does."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field

from fusemega.merge.method import Block, Job, Merge, Method, Passes, TensorSpec, register
from fusemega.merge.methods.linear import check_sum
from fusemega.merge.methods.task_arithmetic import ArithmeticSettings
from fusemega.merge.methods.ties import DensitySettings, merge_by_sign

_NUMBERS_A_COUNT = 8
"""How many fp32 numbers one step of Philox's counter gives."""


def uniform(seed: int, tensor: TensorSpec, model: int, start: int, count: int) -> torch.Tensor:
    """Random numbers in [0, 1), fp32 [count], that belong to elements `start` on of one model's tensor.

    Counter-based: they depend on the seed, the tensor's name, the model's place in the list and the element's place,
    and on nothing that was drawn before. `start` is a multiple of 8.
    """
    digest = hashlib.blake2b(f"{seed}/{model}/{tensor.name}".encode(), digest_size=16).digest()
    steps, rest = divmod(start, _NUMBERS_A_COUNT)
    assert rest == 0
    philox = np.random.Philox(key=int.from_bytes(digest, "little"), counter=steps)
    return torch.from_numpy(np.random.Generator(philox).random(count, dtype=np.float32))


class DareSettings(ArithmeticSettings):
    """Settings for a tensor."""

    rescale: bool = Field(True, description="divide the kept deltas by the density, so that the mean stays the same")


@register
class DareLinear(Method):
    """d_j = delta_j B_j / density_j with B_j ~ Bernoulli(density_j) for each element (without `rescale` not divided);

        theta = base + lambda sum_j w_j d_j, divided by sum_j w_j with `normalize`

    FuseChat v2: density 0.6, weights 0.2, normalized. (mergekit rescales by the ratio of L1 norms instead, which is
    the same in expectation.)
    """

    name = "dare_linear"
    vectors = (3, 2)
    Settings = DareSettings
    ModelSettings = DensitySettings

    def check(self, settings: Any, models: Sequence[Any]) -> None:
        """See `Method.check`."""
        check_sum(settings.normalize, [model.weight for model in models])

    def passes(self, job: Job) -> Passes:
        """See `Method.passes`."""
        weights = [model.weight for model in job.models]
        factor = job.settings.scale / (math.fsum(weights) if job.settings.normalize else 1.0)
        yield from ()  # asks for no pass, but makes this a generator

        def apply(block: Block) -> tuple[torch.Tensor, float]:
            out = block.zeros()
            for delta, weight in zip(dropped(job, block), weights, strict=True):
                out.add_(delta, alpha=factor * weight)
            return block.plus_base(out), 0.0

        return Merge(apply, {"coefficients": [factor * weight for weight in weights]})


@register
class DareTies(Method):
    """The same d_j, merged as TIES merges its own (`Ties`)."""

    name = "dare_ties"
    vectors = (3, 3)
    Settings = DareSettings
    ModelSettings = DensitySettings

    def passes(self, job: Job) -> Passes:
        """See `Method.passes`."""
        yield from ()  # asks for no pass, but makes this a generator
        apply = merge_by_sign(lambda block: dropped(job, block), [model.weight for model in job.models], job.settings)
        pairs = sum(round(model.density * job.elements) for model in job.models)
        return Merge(apply, {"selected": [model.density for model in job.models]}, pairs=pairs)


def dropped(job: Job, block: Block) -> list[torch.Tensor]:
    """K new tensors d_j [n]; see `DareLinear`."""
    deltas = block.deltas()
    for number, (delta, model) in enumerate(zip(deltas, job.models, strict=True)):
        random = uniform(job.seed, block.tensor, number, block.start, len(delta))
        delta.mul_(torch.lt(random, model.density, out=torch.empty_like(random)))
        if job.settings.rescale:
            delta.div_(model.density)
    return deltas
