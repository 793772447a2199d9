"""FuseSFT, the first stage of FuseRL (arXiv:2504.06562): fine-tuning on several sources' responses, weighted by reward.

    sum_i w_i ( - log pi(y_i) / |y_i| ),    w_i = exp(r_i / alpha) / sum_j exp(r_j / alpha)

over the best response of each source, or, with `top_k_responses: k`, over the k best responses of all sources. The
paper does not publish alpha or whether a response's loss is a mean; this project takes the mean over the tokens, and
offers `alpha: auto`: the mean over the prompts of the standard deviation of the rewards that are weighted.

Shape suffixes: S sequences of a micro-batch, C responses that are trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from fusemega.losses.preference import tokens_of, total
from fusemega.losses.registry import ObjectiveSettings, register
from fusemega.losses.responses import ResponseComparison, best_of_each, rewards_of
from fusemega.losses.weighted import Alpha, Weighted
from fusemega.passes.micro_batch import MicroBatch
from fusemega.text.sample import Sample
from fusemega.text.tokenizer import Tokenizer


class FuseSFTSettings(ObjectiveSettings):
    """The `objective` section of `fuse_sft`."""

    name: Literal["fuse_sft"] = "fuse_sft"
    alpha: Alpha = Field(0.01, description="temperature of the weights, or auto; 0.01 is for ArmoRM's rewards")
    top_k_responses: int | None = Field(
        None, ge=1, description="train on so many best responses of all sources; left out: on the best of each source"
    )


@register("fuse_sft")
class FuseSFT(Weighted):
    """Mean over the prompts of the global batch."""

    Settings = FuseSFTSettings
    terms = ("fuse_sft",)
    size = 1
    chosen = rejected = None
    needs = "responses"

    def __init__(self, settings: FuseSFTSettings) -> None:
        super().__init__(settings.alpha, None)
        self.settings = settings
        self.statistics = ("logps",)

    @classmethod
    def build(cls, settings: Any, tokenizer: Tokenizer, vocab_size: int) -> FuseSFT:
        return cls(settings)

    def selected(self, samples: Sequence[Sample]) -> list[int]:
        """The responses that are trained on."""
        if self.settings.top_k_responses is None:
            return best_of_each(samples)
        return np.argsort(-rewards_of(samples), kind="stable")[: self.settings.top_k_responses].tolist()

    def weighed(self, samples: Sequence[Sample]) -> np.ndarray:
        return rewards_of(samples)[self.selected(samples)]

    def compare(self, samples: Sequence[Sample]) -> list[ResponseComparison]:
        places, weights = self.selected(samples), self.weights(self.weighed(samples))
        sources = [{"source": samples[place].scalars.get("source", -1.0)} for place in places]
        return [ResponseComparison((p,), weight, one) for p, weight, one in zip(places, weights, sources, strict=True)]

    def loss(
        self, output: Tensor, batch: MicroBatch, denominators: Mapping[str, Tensor | float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logp_C = (output / tokens_of(batch, output))[batch.members[:, 0]]
        loss, summed = total(batch, -logp_C, denominators["fuse_sft"])
        told = (batch.comparison_fields["share"] * logp_C.detach().double()).sum()
        return loss, {"fuse_sft": summed, "logps": told}
