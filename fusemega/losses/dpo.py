"""Direct preference optimisation (Rafailov et al., arXiv:2305.18290) and its relatives, by TRL's names.

With h(y) = log pi(y|x) - log pi_ref(y|x), summed over the response's tokens, and d = h(chosen) - h(rejected):

    sigmoid       - log sigmoid(beta d)
    sigmoid_norm  the same with h(y) / |y|: length-normalised DPO (FuseChat-3.0, arXiv:2503.04222)
    hinge         max(0, 1 - beta d)                          (SLiC, arXiv:2305.10425)
    ipo           (d - 1 / (2 beta))^2 with h(y) / |y|, as in TRL           (arXiv:2310.12036)
    ipo_sum       the same with h(y), as the paper has it

    label_smoothing e   (1 - e) (- log sigmoid(beta d)) + e (- log sigmoid(-beta d))       (cDPO)
    ld_alpha a          tokens beyond the length of the pair's shorter response count a times in both log-probabilities
                        of h (LD-DPO, arXiv:2409.06411); the length |y| stays
    rpo_alpha r         + r (- log pi(chosen) / |chosen|)                      (iterative RPO, arXiv:2404.19733)

The last is the mean over the tokens of one response, so that it does not depend on which pairs share a micro-batch.

Shape suffixes: S sequences of a micro-batch, C pairs, M sums of a sequence (with ld_alpha 2: weighted, plain),
P supervised tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from fusemega.losses.preference import Preference, kl_of, only_with, smoothed, tokens_of, total
from fusemega.losses.reference import Reference, ReferenceSettings
from fusemega.losses.registry import ObjectiveSettings, register
from fusemega.passes.micro_batch import MicroBatch
from fusemega.text.sample import Sample
from fusemega.text.tokenizer import Tokenizer

LossType = Literal["sigmoid", "sigmoid_norm", "hinge", "ipo", "ipo_sum"]
NORMALISED = ("sigmoid_norm", "ipo")


class DPOSettings(ObjectiveSettings):
    """The `objective` section of `dpo`."""

    name: Literal["dpo"] = "dpo"
    loss_type: LossType = Field("sigmoid", description="form of the loss; sigmoid_norm: length-normalised DPO")
    beta: float = Field(
        0.1, gt=0, description="strength of the tie to the reference; smaller: the model may go further"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="probability that a preference is reversed; for sigmoid and sigmoid_norm"
    )
    ld_alpha: float | None = Field(
        None,
        ge=0,
        le=1,
        description="weight of the tokens beyond the length of the pair's shorter response; left out: 1; needs "
        "reference.in_job, because a store has whole sums",
    )
    rpo_alpha: float | None = Field(
        None, gt=0, description="weight of the chosen response's mean negative log-probability, which is added"
    )
    reference: ReferenceSettings

    @field_validator("label_smoothing")
    @classmethod
    def _smoothing_of_sigmoids(cls, value: float, info: ValidationInfo) -> float:
        return float(only_with(value, info, "sigmoid", "sigmoid_norm"))

    @field_validator("reference")
    @classmethod
    def _weighted_reference(cls, value: ReferenceSettings, info: ValidationInfo) -> ReferenceSettings:
        if info.data.get("ld_alpha") is not None and value.in_job is None:
            raise ValueError("a store has whole sums, and ld_alpha weighs tokens; allowed: reference.in_job")
        return value


@register("dpo")
class DPO(Preference):
    """Mean over the pairs of the global batch."""

    Settings = DPOSettings
    terms = ("dpo",)
    reference: Reference

    def __init__(self, settings: DPOSettings, reference: Reference) -> None:
        super().__init__(reference)
        self.settings = settings
        if settings.rpo_alpha is not None:
            self.statistics = (*self.statistics, "nll_loss")

    @classmethod
    def build(cls, settings: Any, tokenizer: Tokenizer, vocab_size: int) -> DPO:
        return cls(settings, Reference(settings.reference, tokenizer))

    def token_weights(self, samples: Sequence[Sample]) -> list[np.ndarray] | None:
        if self.settings.ld_alpha is None:
            return None
        weights = [np.ones((len(sample.positions), 2), dtype=np.float64) for sample in samples]
        for pair in self.compare(samples):
            shared = min(len(weights[place]) for place in pair.places)
            for place in pair.places:
                weights[place][shared:, 0] = self.settings.ld_alpha
        return weights

    def loss(
        self, output: Tensor, batch: MicroBatch, denominators: Mapping[str, Tensor | float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        settings, given = self.settings, self.reference.logp(batch)
        of_tokens = output.dim() == 2
        logp_S, plain_S = output.unbind(1) if of_tokens else (output, output)
        reference_S, plain_reference_S = given.unbind(1) if of_tokens else (given, given)
        tokens_S = tokens_of(batch, output)
        h_S = logp_S - reference_S
        if settings.loss_type in NORMALISED:
            h_S = h_S / tokens_S
        chosen_C, rejected_C = h_S[batch.members].unbind(1)
        loss_C = pair_loss(chosen_C - rejected_C, settings.loss_type, settings.beta, settings.label_smoothing)
        told = self.told(batch, settings.beta * h_S, plain_S)
        told |= self.told_kl(batch, kl_of(plain_S - plain_reference_S, tokens_S), 2)
        if settings.rpo_alpha is not None:
            nll_C = (-plain_S / tokens_S)[batch.members[:, 0]]
            loss_C = loss_C + settings.rpo_alpha * nll_C
            told["nll_loss"] = nll_C.detach().sum()
        loss, summed = total(batch, loss_C, denominators["dpo"])
        return loss, {"dpo": summed, **told}


def pair_loss(difference: Tensor, loss_type: LossType, beta: float, label_smoothing: float) -> Tensor:
    """The loss of each pair, from h(chosen) - h(rejected)."""
    if loss_type == "hinge":
        return (1 - beta * difference).clamp(min=0)
    if loss_type in ("ipo", "ipo_sum"):
        return (difference - 1 / (2 * beta)) ** 2
    return smoothed(beta * difference, label_smoothing)
