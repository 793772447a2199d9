"""Supervised fine-tuning (and plain language modelling): cross-entropy of the next token.

    L = - 1/N_global sum_t log q(y_t)        over supervised tokens t

Shape suffixes: N supervised positions (T in the kernel's names), H hidden size, V this rank's vocabulary rows, K listed
ids (here 1), C of these positions in a chunk, M sums that metrics are made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from fusemega.logits.vocab import Query, SparseLogProbs, fused_token_loss
from fusemega.losses.registry import Objective, ObjectiveSettings, register
from fusemega.passes.answers import HiddenStates
from fusemega.passes.micro_batch import MicroBatch

if TYPE_CHECKING:
    from fusemega.text.tokenizer import Tokenizer


@register("sft")
class SFT(Objective[HiddenStates]):
    """Mean cross-entropy over the supervised tokens of the global batch, in nats."""

    class Settings(ObjectiveSettings):
        name: Literal["sft"] = "sft"

    terms = ("lm",)
    unit = "token"

    @classmethod
    def build(cls, settings: SFT.Settings, tokenizer: Tokenizer, vocab_size: int) -> SFT:
        return cls()

    def counts(self, batch: MicroBatch) -> dict[str, int]:
        return {"lm": len(batch.labels)}

    def loss(
        self, output: HiddenStates, batch: MicroBatch, denominators: Mapping[str, Tensor | float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        def cross_entropy(results: list[SparseLogProbs], rows: slice) -> tuple[Tensor, Tensor]:
            ce_C = -results[0].logp_TK[:, 0]
            return ce_C / denominators["lm"], ce_C[:, None]

        queries = [Query(batch.labels[:, None])]
        loss, sums_M = fused_token_loss(output.hidden_NH, output.weight_VH, queries, cross_entropy, **output.head)
        return loss, {"lm": sums_M[0]}
