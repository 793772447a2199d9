"""A loss that couples the tokens of a sample, to test the contract of sequence objectives.

    L = - 1/S_global sum_s log sigmoid(mean_t log q(y_t))

Taken token by token it would be another loss: the sigmoid of a mean is not the mean of sigmoids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from fusemega.losses.registry import Objective, ObjectiveSettings
from fusemega.passes.micro_batch import MicroBatch
from fusemega.text.tokenizer import Tokenizer


class SequenceMean(Objective[Tensor]):
    """To be given to `register` by the tests that run it."""

    class Settings(ObjectiveSettings):
        name: Literal["sequence_mean"] = "sequence_mean"

    terms = ("sequence",)
    unit = "sequence"

    @classmethod
    def build(cls, settings: Any, tokenizer: Tokenizer, vocab_size: int) -> SequenceMean:
        return cls()

    def counts(self, batch: MicroBatch) -> dict[str, int]:
        return {"sequence": len(batch.sequence_tokens)}

    def loss(
        self, output: Tensor, batch: MicroBatch, denominators: Mapping[str, Tensor | float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        total = sequence_mean_loss(output, batch.sequence_tokens)
        return total / denominators["sequence"], {"sequence": total.detach()}


def sequence_mean_loss(logp_S: Tensor, tokens_S: Tensor) -> Tensor:
    """The sum over samples; a sample without supervised tokens counts log sigmoid(0)."""
    return -logsigmoid(logp_S / tokens_S.clamp(min=1)).sum()
