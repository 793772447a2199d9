"""FusePO, the second stage of FuseRL (arXiv:2504.06562): a preference loss inside each source, weighted over sources.

    sum_i w_i L_i,    w_i = exp(r_i / alpha) / sum_j exp(r_j / alpha),    r_i: the best reward of source i

L_i is a loss on the responses of source i alone:

    dpo     `sigmoid` of `fusemega.losses.dpo` on its best and its worst response
    simpo   `fusemega.losses.simpo` on the same pair
    rloo    `fusemega.losses.rloo` on all of its responses

A source without two different rewards has no L_i and takes no part in the weights, which sum to 1. The paper does not
publish alpha, beta or the coefficient of the KL divergence; the defaults are this project's.

Shape suffixes: S sequences of a micro-batch, C pairs, or responses of rloo.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from fusemega.losses.preference import kl_of, needed_with, smoothed, tokens_of, total
from fusemega.losses.reference import Reference, ReferenceSettings
from fusemega.losses.registry import ObjectiveSettings, register
from fusemega.losses.responses import ResponseComparison, advantages, best_and_worst, by_source, rewards_of
from fusemega.losses.rloo import reinforced
from fusemega.losses.weighted import Alpha, Weighted
from fusemega.passes.micro_batch import MicroBatch
from fusemega.text.sample import Sample
from fusemega.text.tokenizer import Tokenizer


class FusePOSettings(ObjectiveSettings):
    """The `objective` section of `fuse_po`."""

    name: Literal["fuse_po"] = "fuse_po"
    loss_type: Literal["dpo", "simpo", "rloo"] = Field("dpo", description="loss inside a source")
    alpha: Alpha = Field(0.01, description="temperature of the weights, or auto; 0.01 is for ArmoRM's rewards")
    beta: float = Field(
        gt=0,
        description="dpo: strength of the tie to the reference, such as 0.01; simpo: factor, such as 10; rloo: "
        "coefficient of the KL divergence, such as 0.01",
    )
    gamma_beta_ratio: float | None = Field(
        None, ge=0, validate_default=True, description="for simpo: target margin over beta, such as 0.3"
    )
    reference: ReferenceSettings | None = Field(None, validate_default=True)

    @field_validator("gamma_beta_ratio")
    @classmethod
    def _gamma_of_simpo(cls, value: float | None, info: ValidationInfo) -> float | None:
        return needed_with(value, info, "simpo")

    @field_validator("reference")
    @classmethod
    def _reference_of_ratios(cls, value: ReferenceSettings | None, info: ValidationInfo) -> ReferenceSettings | None:
        return needed_with(value, info, "dpo", "rloo")


@register("fuse_po")
class FusePO(Weighted):
    """Mean over the prompts of the global batch. Metrics are weighted over the sources as the loss is."""

    Settings = FusePOSettings
    terms = ("fuse_po",)
    needs = "two responses of one source with different rewards"

    def __init__(self, settings: FusePOSettings, reference: Reference | None) -> None:
        super().__init__(settings.alpha, reference)
        self.settings = settings

    @classmethod
    def build(cls, settings: Any, tokenizer: Tokenizer, vocab_size: int) -> FusePO:
        reference = None if settings.reference is None else Reference(settings.reference, tokenizer)
        return (FuseRLOO if settings.loss_type == "rloo" else FusePO)(settings, reference)

    def weighed(self, samples: Sequence[Sample]) -> np.ndarray:
        rewards = rewards_of(samples)
        return np.array([rewards[best] for best, _ in self._extremes(samples, rewards).values()])

    def compare(self, samples: Sequence[Sample]) -> list[ResponseComparison]:
        rewards = rewards_of(samples)
        found = self._extremes(samples, rewards)
        if not found:
            return []
        weights = self.weights(self.weighed(samples))
        return [
            replace(each, numbers={**each.numbers, "source": float(source)})
            for source, weight in zip(found, weights, strict=True)
            for each in self.inside(rewards, by_source(samples)[source], weight)
        ]

    def inside(self, rewards: np.ndarray, places: Sequence[int], share: float) -> list[ResponseComparison]:
        """The comparisons of one source, which share its weight."""
        found = best_and_worst(rewards, places)
        return [] if found is None else [ResponseComparison(found, share)]

    @staticmethod
    def _extremes(samples: Sequence[Sample], rewards: np.ndarray) -> dict[int, tuple[int, int]]:
        """The best and the worst response of each source that has two different rewards."""
        found = {source: best_and_worst(rewards, places) for source, places in by_source(samples).items()}
        return {source: pair for source, pair in found.items() if pair is not None}

    def loss(
        self, output: Tensor, batch: MicroBatch, denominators: Mapping[str, Tensor | float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        beta, gamma = self.settings.beta, self.settings.gamma_beta_ratio or 0.0
        tokens_S = tokens_of(batch, output)
        if self.reference is None:
            h_S = logp_S = output / tokens_S
            told: dict[str, Tensor] = {}
        else:
            h_S, logp_S = output - self.reference.logp(batch), output
            told = self.told_kl(batch, kl_of(h_S, tokens_S), 2)
        chosen_C, rejected_C = h_S[batch.members].unbind(1)
        loss_C = smoothed(beta * (chosen_C - rejected_C - gamma), 0.0)
        loss, summed = total(batch, loss_C, denominators["fuse_po"])
        return loss, {"fuse_po": summed, **told, **self.told(batch, beta * h_S, logp_S)}


class FuseRLOO(FusePO):
    """`loss_type: rloo`."""

    size = 3
    numbers = ("source", "advantage")
    chosen, rejected = 1, 2

    def inside(self, rewards: np.ndarray, places: Sequence[int], share: float) -> list[ResponseComparison]:
        return advantages(rewards, places, share)

    def loss(
        self, output: Tensor, batch: MicroBatch, denominators: Mapping[str, Tensor | float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss_C, told = reinforced(self, output, batch, self.settings.beta)
        loss, summed = total(batch, loss_C, denominators["fuse_po"])
        return loss, {"fuse_po": summed, **told}
