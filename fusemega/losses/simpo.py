"""SimPO: preference optimisation without a reference (Meng et al., arXiv:2405.14734).

    - log sigmoid(beta log pi(chosen) / |chosen| - beta log pi(rejected) / |rejected| - gamma)

with gamma = gamma_beta_ratio beta, as the paper's code has it. (TRL's `simpo_gamma` is gamma itself.)

Shape suffixes: S sequences of a micro-batch, C pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from fusemega.losses.preference import Preference, tokens_of, total
from fusemega.losses.registry import ObjectiveSettings, register
from fusemega.passes.micro_batch import MicroBatch
from fusemega.text.tokenizer import Tokenizer


class SimPOSettings(ObjectiveSettings):
    """The `objective` section of `simpo`."""

    name: Literal["simpo"] = "simpo"
    beta: float = Field(2.0, gt=0, description="factor of the mean log-probabilities")
    gamma_beta_ratio: float = Field(0.25, ge=0, description="target margin over beta")


@register("simpo")
class SimPO(Preference):
    """Mean over the pairs of the global batch. Metrics have the mean log-probability of a token, as in TRL."""

    Settings = SimPOSettings
    terms = ("simpo",)

    def __init__(self, settings: SimPOSettings) -> None:
        super().__init__(None)
        self.settings = settings

    @classmethod
    def build(cls, settings: Any, tokenizer: Tokenizer, vocab_size: int) -> SimPO:
        return cls(settings)

    def loss(
        self, output: Tensor, batch: MicroBatch, denominators: Mapping[str, Tensor | float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        beta, mean_S = self.settings.beta, output / tokens_of(batch, output)
        chosen_C, rejected_C = mean_S[batch.members].unbind(1)
        loss_C = -logsigmoid(beta * (chosen_C - rejected_C - self.settings.gamma_beta_ratio))
        loss, summed = total(batch, loss_C, denominators["simpo"])
        return loss, {"simpo": summed, **self.told(batch, beta * mean_S, mean_S)}
