"""RLOO (Ahmadian et al., arXiv:2402.14740), offline: REINFORCE on stored responses with a leave-one-out baseline.

    1/k sum_j ( - A_j log pi(y_j) + beta kl(y_j) ),    A_j = r_j - 1/(k - 1) sum_{i != j} r_i

over the k responses of a group with rewards r. The responses are not the model's own and there is no importance ratio:
this is the gradient of TRL's loss at ratio 1. `beta` is the coefficient of KL(pi, pi_ref), estimated as
`fusemega.losses.preference` says. TRL subtracts its KL from the reward instead, which on stored responses would be a
constant.

Metrics call the response of highest reward chosen and that of lowest reward rejected; `rewards/*` are
log pi - log pi_ref (without a reference log pi).

Shape suffixes: S sequences of a micro-batch, C responses that are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from fusemega.losses.preference import Preference, kl_of, tokens_of, total
from fusemega.losses.reference import Reference, ReferenceSettings
from fusemega.losses.registry import ObjectiveSettings, register
from fusemega.losses.responses import ResponseComparison, advantages, rewards_of
from fusemega.passes.micro_batch import MicroBatch
from fusemega.text.sample import Sample
from fusemega.text.tokenizer import Tokenizer


class RLOOSettings(ObjectiveSettings):
    """The `objective` section of `rloo`."""

    name: Literal["rloo"] = "rloo"
    beta: float = Field(0.01, ge=0, description="coefficient of the KL divergence from the reference; 0: no reference")
    reference: ReferenceSettings | None = Field(None, validate_default=True)

    @field_validator("reference")
    @classmethod
    def _reference_of_kl(cls, value: ReferenceSettings | None, info: ValidationInfo) -> ReferenceSettings | None:
        beta = info.data.get("beta")
        if beta is not None and (beta > 0) != (value is not None):
            wrong = "no effect with beta 0; leave it out" if value else "needed for the KL divergence, unless beta is 0"
            raise ValueError(wrong)
        return value


@register("rloo")
class RLOO(Preference):
    """Mean over the groups of the global batch, of each the mean over its responses."""

    Settings = RLOOSettings
    terms = ("rloo",)
    size = 3
    numbers = ("advantage",)
    chosen, rejected = 1, 2

    def __init__(self, settings: RLOOSettings, reference: Reference | None) -> None:
        super().__init__(reference)
        self.settings = settings

    @classmethod
    def build(cls, settings: Any, tokenizer: Tokenizer, vocab_size: int) -> RLOO:
        return cls(settings, None if settings.reference is None else Reference(settings.reference, tokenizer))

    def compare(self, samples: Sequence[Sample]) -> list[ResponseComparison]:
        return advantages(rewards_of(samples), range(len(samples)))

    def loss(
        self, output: Tensor, batch: MicroBatch, denominators: Mapping[str, Tensor | float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss_C, told = reinforced(self, output, batch, self.settings.beta)
        loss, summed = total(batch, loss_C, denominators["rloo"])
        return loss, {"rloo": summed, **told}


def reinforced(
    objective: Preference, logp_S: Tensor, batch: MicroBatch, beta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """[C]: -A log pi + beta kl of each response that is compared; and the sums of metrics."""
    own_C = batch.members[:, 0]
    advantage_C = batch.comparison_fields["advantage"].to(logp_S.dtype)
    loss_C = -advantage_C * logp_S[own_C]
    if objective.reference is None:
        return loss_C, objective.told(batch, logp_S, logp_S)
    ratio_S = logp_S - objective.reference.logp(batch)
    kl_S = kl_of(ratio_S, tokens_of(batch, logp_S))
    told = objective.told(batch, ratio_S, logp_S) | objective.told_kl(batch, kl_S, 1)
    return loss_C + beta * kl_S[own_C], told
