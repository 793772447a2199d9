"""Supervised fine-tuning (and plain language modelling): cross-entropy of the next token.

    L = - 1/N_global sum_t log q(y_t)        over supervised tokens t

Shape suffixes: N supervised positions, H hidden size, V this rank's vocabulary rows, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from fusemega.logits.vocab import Query, SparseLogProbs, fused_token_loss
from fusemega.losses.registry import ObjectiveSettings, TokenObjective, register

if TYPE_CHECKING:
    from fusemega.text.sample import Sample
    from fusemega.text.tokenizer import Tokenizer


@register("sft")
class SFT(TokenObjective):
    """Mean cross-entropy over the supervised tokens of the global batch, in nats."""

    class Settings(ObjectiveSettings):
        name: Literal["sft"] = "sft"

    terms = ("lm",)

    @classmethod
    def build(cls, settings: SFT.Settings, tokenizer: Tokenizer, vocab_size: int) -> SFT:
        return cls()

    def sample_fields(self, sample: Sample) -> dict[str, np.ndarray]:
        return {}

    def counts(self, batch: Mapping[str, Any]) -> dict[str, int]:
        return {"lm": len(batch["labels"])}

    def loss(
        self,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        batch: Mapping[str, Any],
        denominators: Mapping[str, Tensor | float],
        head_kwargs: Mapping[str, Any],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        def cross_entropy(results: list[SparseLogProbs], rows: slice) -> tuple[Tensor, Tensor]:
            ce_C = -results[0].logp_TK[:, 0]
            return ce_C / denominators["lm"], ce_C[:, None]

        loss, sums_M = fused_token_loss(
            hidden_NH, weight_VH, [Query(batch["labels"][:, None])], cross_entropy, **head_kwargs
        )
        return loss, {"lm": sums_M[0]}
