"""ORPO: fine-tuning on the chosen response with an odds-ratio penalty (Hong et al., arXiv:2403.07691).

    - p(chosen) - beta log sigmoid(log odds(chosen) - log odds(rejected)),    log odds(y) = p(y) - log(1 - exp p(y))

with p(y) = log pi(y) / |y|, the mean over the response's tokens. `beta` is the paper's lambda and TRL's beta. The first
term covers the response alone, as in the paper; TRL's also covers the prompt.

Shape suffixes: S sequences of a micro-batch, C pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from fusemega.losses.preference import Preference, tokens_of, total
from fusemega.losses.registry import ObjectiveSettings, register
from fusemega.passes.micro_batch import MicroBatch
from fusemega.text.tokenizer import Tokenizer


class ORPOSettings(ObjectiveSettings):
    """The `objective` section of `orpo`."""

    name: Literal["orpo"] = "orpo"
    beta: float = Field(0.1, gt=0, description="weight of the odds-ratio penalty")


@register("orpo")
class ORPO(Preference):
    """Mean over the pairs of the global batch. Metrics have the mean log-probability of a token, as in TRL."""

    Settings = ORPOSettings
    terms = ("orpo",)

    def __init__(self, settings: ORPOSettings) -> None:
        super().__init__(None)
        self.settings = settings
        self.statistics = (*self.statistics, "nll_loss", "log_odds_ratio", "log_odds_chosen")

    @classmethod
    def build(cls, settings: Any, tokenizer: Tokenizer, vocab_size: int) -> ORPO:
        return cls(settings)

    def loss(
        self, output: Tensor, batch: MicroBatch, denominators: Mapping[str, Tensor | float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        mean_S = output / tokens_of(batch, output)
        chosen_C, rejected_C = mean_S[batch.members].unbind(1)
        odds_C = log_odds(chosen_C) - log_odds(rejected_C)
        ratio_C = logsigmoid(odds_C)
        loss, summed = total(batch, -chosen_C - self.settings.beta * ratio_C, denominators["orpo"])
        told = self.told(batch, self.settings.beta * mean_S, mean_S)
        told |= {"nll_loss": -chosen_C.detach().sum(), "log_odds_ratio": ratio_C.detach().sum()}
        return loss, {"orpo": summed, "log_odds_chosen": odds_C.detach().sum(), **told}


def log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p, exact at both ends; a probability that rounds to 1 counts as one step below it."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    # Each form is differentiated only where it is used: the other's gradient may be infinite there.
    near = logp > -math.log(2)
    of_near = torch.log(-torch.expm1(torch.where(near, logp, -1.0)))
    of_far = torch.log1p(-torch.exp(torch.where(near, -1.0, logp)))
    return logp - torch.where(near, of_near, of_far)
