"""A loss that couples the tokens of a sample, to test the contract of sequence objectives.

    L = - 1/S_global sum_s log sigmoid(mean_t log q(y_t))

Taken token by token it would be another loss: the sigmoid of a mean is not the mean of sigmoids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from torch import Tensor
from torch.nn.functional import logsigmoid

from fusemega.losses.registry import ObjectiveSettings, SequenceObjective
from fusemega.text.sample import Sample
from fusemega.text.tokenizer import Tokenizer


class SequenceMean(SequenceObjective):
    """To be given to `register` by the tests that run it."""

    class Settings(ObjectiveSettings):
        name: Literal["sequence_mean"] = "sequence_mean"

    terms = ("sequence",)

    @classmethod
    def build(cls, settings: Any, tokenizer: Tokenizer, vocab_size: int) -> SequenceMean:
        return cls()

    def sample_fields(self, sample: Sample) -> dict[str, np.ndarray]:
        return {}

    def counts(self, batch: Mapping[str, Any]) -> dict[str, int]:
        return {"sequence": len(batch["sequence_tokens"])}

    def loss(
        self, logp_S: Tensor, batch: Mapping[str, Any], denominators: Mapping[str, Tensor | float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        total = sequence_mean_loss(logp_S, batch["sequence_tokens"])
        return total / denominators["sequence"], {"sequence": total.detach()}


def sequence_mean_loss(logp_S: Tensor, tokens_S: Tensor) -> Tensor:
    """The sum over samples; a sample without supervised tokens counts log sigmoid(0)."""
    return -logsigmoid(logp_S / tokens_S.clamp(min=1)).sum()
