"""TIES: trim, elect sign, merge (Yadav et al., 2023, arXiv:2306.01708)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from pydantic import Field

from fusemega.merge.method import Block, Job, Merge, Method, Passes, register
from fusemega.merge.methods.task_arithmetic import ArithmeticSettings, WeightSettings
from fusemega.merge.select import PASS_NAMES, Keys, select_largest, selection_bytes
from fusemega.merge.signs import agreeing_sums, elect, ratio


class TiesSettings(ArithmeticSettings):
    """Settings for a tensor."""

    normalize: bool = Field(
        True, description="divide each element by the sum of the weights of the models that take part in it"
    )


class DensitySettings(WeightSettings):
    """Settings for a model."""

    density: float = Field(1.0, gt=0, le=1, description="share of the delta that is kept")


@register
class Ties(Method):
    """Per tensor, d_j is delta_j with all but its max(1, int(density_j n)) largest magnitudes zeroed. Per element then,

        sign  = sign of sum_j w_j d_j  (zero counts as +)
        m_j   = 1 where w_j d_j has that sign, else 0
        theta = base + lambda sum_j w_j m_j d_j / sum_j w_j m_j  (without `normalize` not divided; a sum of 0 is 1)

    FuseChat v2: density 0.6, weights 0.2, normalized.
    """

    name = "ties"
    pass_names = PASS_NAMES
    vectors = (3, 3)
    Settings = TiesSettings
    ModelSettings = DensitySettings

    def remembered_bytes(self, elements: int, models: int) -> int:
        """See `Method.remembered_bytes`."""
        return selection_bytes(elements, models)

    def passes(self, job: Job) -> Passes:
        """See `Method.passes`."""
        (tensor,) = job.tensors
        counts = [max(1, int(model.density * tensor.elements)) for model in job.models]
        keys = Keys(lambda block: (block.delta(number).abs_().float() for number in range(len(counts))))
        selections = yield from select_largest(job, keys, lambda nonzero: counts)

        def trimmed(block: Block) -> list[torch.Tensor]:
            return [selection.trim(block, block.delta(number)) for number, selection in enumerate(selections)]

        apply = merge_by_sign(trimmed, [model.weight for model in job.models], job.settings)
        selected = [count / tensor.elements for count in counts]
        return Merge(apply, {"selected": selected}, pairs=sum(counts))


def merge_by_sign(
    sparse: Callable[[Block], list[torch.Tensor]], weights: Sequence[float], settings: ArithmeticSettings
) -> Callable[[Block], tuple[torch.Tensor, float]]:
    """The election and the merge that TIES, DARE-TIES and DELLA share; see `Ties`.

    Args:
        sparse: block -> K new tensors d_j [n].
        weights: K.
        settings: normalize and lambda.
    """

    def apply(block: Block) -> tuple[torch.Tensor, float]:
        deltas = sparse(block)
        wanted = torch.zeros_like(deltas[0])
        for delta, weight in zip(deltas, weights, strict=True):
            # Rounded before the sum, as in other implementations: with `alpha`, two opposite values might not cancel.
            wanted.add_(torch.mul(delta, weight))
        merged, share, agreed = agreeing_sums(deltas, weights, elect(wanted))
        if settings.normalize:
            merged = ratio(merged, share)
        return block.plus_base(merged if settings.scale == 1 else merged.mul_(settings.scale)), agreed

    return apply
