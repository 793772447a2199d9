"""Distillation from a sample store: a teacher's k most probable ids at every supervised token.

    L = lambda / N_lm  sum_t  CE(y_t, q_t)  +  (1 - lambda) T^2 / N_distill  sum_{t with a row}  CE(p_t, q_t^T)

with q^T = softmax(logits / T), q = q^1, and p the teacher's row, one of two ways:

* `tail: renormalise` (FuseLLM, arXiv:2401.10491; FuseChat, arXiv:2402.16107): p is the row's softmax over its k ids,
  at temperature T whatever temperature it was stored at. What the teacher gave to other ids is shared out over the k.
* `tail: residual`: p keeps the teacher's own probabilities and one more outcome, "any other id", whose student
  probability is the sum over those ids. T must be the store's: a stored residual cannot be brought to another.

The distillation term is multiplied by T^2 (Hinton et al., arXiv:1503.02531, section 2.1), so that its gradient keeps
its size as T grows; the cross-entropy on labels is always at temperature 1. The metric `distill` is the mean of
CE(p, q^T) itself, without lambda and without T^2. Positions without a row have the label's term only.

Shape suffixes: N supervised positions of a micro-batch, P of one sample, K ids of a row, H hidden size, V this rank's
vocabulary rows, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from fusemega.checkpoint.open_model import weights_hash
from fusemega.errors import UserError
from fusemega.losses.registry import ObjectiveSettings, TokenObjective, register
from fusemega.losses.vocab import Query, SparseLogProbs, fused_token_loss
from fusemega.runtime.console import global_rank
from fusemega.store import Manifest, Store
from fusemega.text.document import MASK_POLICY

if TYPE_CHECKING:
    from fusemega.text.dataset import TokenizedDataset
    from fusemega.text.sample import Sample
    from fusemega.text.tokenizer import Tokenizer


@register("distill")
class Distill(TokenObjective):
    """lambda * cross-entropy on labels + (1 - lambda) * T^2 * cross-entropy on the teacher's rows.

    Args:
        settings: as in the run file.
        store: the teacher's rows, of the same tokenizer as the student.
        vocab_size: the student's. Models of one tokenizer may pad their vocabularies differently: a teacher with more
            rows is welcome as long as no row lists an id that the student lacks.

    Raises:
        UserError: `tail: residual` at another temperature than the store's.
    """

    class Settings(ObjectiveSettings):
        model_config = ConfigDict(populate_by_name=True)

        name: Literal["distill"] = "distill"
        store: str = Field(description="folder of a sample store, written by `fusemega teach`")
        teacher: str | None = Field(
            None, description="the model that the store must be of, a folder or hub id; reads all its weights once"
        )
        lambda_: float = Field(0.9, alias="lambda", ge=0, le=1, description="weight of the cross-entropy on labels")
        temperature: float = Field(1.0, gt=0, description="of teacher and student in the distillation term")
        tail: Literal["renormalise", "residual"] = Field("renormalise", description="the mass outside the k stored ids")
        on_missing: Literal["error", "skip"] = Field("error", description="for a sample without a row in the store")

    terms = ("lm", "distill")

    def __init__(self, settings: Distill.Settings, store: Store, vocab_size: int) -> None:
        self.settings, self.store, self.vocab_size = settings, store, vocab_size
        self.check_store(store.manifest)

    @classmethod
    def build(cls, settings: Distill.Settings, tokenizer: Tokenizer, vocab_size: int) -> Distill:
        store = Store.open(settings.store)
        hashes = {"tokenizer": tokenizer.content_hash, "template": tokenizer.template_hash}
        store.check(hashes | {"mask_policy": MASK_POLICY})
        # One rank reads the weights for all: where it refuses, the launch ends.
        if settings.teacher is not None and global_rank() == 0:
            found = weights_hash(settings.teacher)
            if found != store.manifest.weights:
                raise UserError(
                    f"objective.teacher: {store.path} holds rows of other weights than {settings.teacher} "
                    f"(store {store.manifest.weights[:12]}, model {found[:12]})"
                )
        return cls(settings, store, vocab_size)

    def check_store(self, manifest: Manifest) -> None:
        """Raises UserError where the store's temperature rules out these settings."""
        if self.settings.tail == "residual" and self.settings.temperature != manifest.temperature:
            raise UserError(
                f"objective.temperature: found {self.settings.temperature}, and {self.store.path} was stored at "
                f"{manifest.temperature}; with tail: residual they must be equal (or use tail: renormalise)"
            )

    def sample_fields(self, sample: Sample) -> dict[str, np.ndarray]:
        """teacher_ids int64 [P, K] (-1: none), teacher_logp fp32 [P, K], teacher_log_residual fp32 [P], teacher_mask.

        Raises:
            UserError: no row (unless `on_missing: skip`), or a row of another tokenization or mask, or with ids beyond
                the student's vocabulary.
        """
        row = self.store.get(sample.key)
        positions = len(sample.positions)
        if row is None:
            if self.settings.on_missing == "error":
                raise UserError(self._no_row(sample))
            k = self.store.manifest.top_k
            return {
                "teacher_ids": np.full((positions, k), -1, dtype=np.int64),
                "teacher_logp": np.zeros((positions, k), dtype=np.float32),
                "teacher_log_residual": np.zeros(positions, dtype=np.float32),
                "teacher_mask": np.zeros(positions, dtype=bool),
            }
        if row.ids_hash != sample.ids_hash:
            raise UserError(f"{sample.source}: the row in the store {self.store.path} is of other token ids")
        if row.num_tokens != positions:
            raise UserError(
                f"{sample.source}: the row in the store {self.store.path} has {row.num_tokens} positions, "
                f"the sample {positions} supervised tokens"
            )
        ids_PK = row.ids_PK.astype(np.int64)
        if ids_PK.max(initial=-1) >= self.vocab_size:
            raise UserError(
                f"{sample.source}: the row in the store {self.store.path} lists id {ids_PK.max()}, and the model in "
                f"training has a vocabulary of {self.vocab_size}"
            )
        return {
            "teacher_ids": ids_PK,
            "teacher_logp": row.logp_PK.astype(np.float32),
            "teacher_log_residual": row.log_residual_P.astype(np.float32),
            "teacher_mask": np.ones(positions, dtype=bool),
        }

    def check_data(self, dataset: TokenizedDataset) -> None:
        self.sample_fields(dataset[0])  # reads one shard whole, and compares the tokenizations
        if self.settings.on_missing == "error":
            for sample in dataset:
                if sample.key not in self.store:
                    raise UserError(self._no_row(sample))

    def counts(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"lm": torch.tensor(len(batch["labels"])), "distill": batch["teacher_mask"].sum()}

    def loss(
        self,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        batch: Mapping[str, Any],
        denominators: Mapping[str, Tensor | float],
        head_kwargs: Mapping[str, Any],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        settings = self.settings
        p_NK, p_other_N = self._teacher(batch, torch.promote_types(hidden_NH.dtype, torch.float32))
        lm_weight = settings.lambda_ / denominators["lm"]
        distill_weight = (1.0 - settings.lambda_) * settings.temperature**2 / denominators["distill"]

        def token_loss(results: list[SparseLogProbs], rows: slice) -> tuple[Tensor, Tensor]:
            label, taught = results
            ce_C = -label.logp_TK[:, 0]
            kd_C = -(p_NK[rows] * taught.logp_TK).sum(1)
            if p_other_N is not None and taught.log_residual_T is not None:
                p_other_C = p_other_N[rows]
                # Where every id is listed the student's residual is -inf, and the teacher's probability 0.
                kd_C = kd_C - p_other_C * torch.where(p_other_C > 0, taught.log_residual_T, 0.0)
            return lm_weight * ce_C + distill_weight * kd_C, torch.stack([ce_C, kd_C], dim=1)

        queries = [
            Query(batch["labels"][:, None]),
            Query(batch["teacher_ids"], settings.temperature, residual=p_other_N is not None),
        ]
        loss, sums_M = fused_token_loss(hidden_NH, weight_VH, queries, token_loss, **head_kwargs)
        return loss, {"lm": sums_M[0], "distill": sums_M[1]}

    def _no_row(self, sample: Sample) -> str:
        return (
            f"{sample.source}: no row in the store {self.store.path} (allowed with on_missing: skip); "
            "it was written from other data, or with another seq_length"
        )

    def _teacher(self, batch: Mapping[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The row as probabilities [N, K], and that of all other ids [N] if it is kept; 0 where there is no row."""
        mask_N = batch["teacher_mask"]
        logp_NK = batch["teacher_logp"].to(dtype)
        listed_NK = (batch["teacher_ids"] >= 0) & mask_N[:, None]
        if self.settings.tail == "residual":
            p_other_N = torch.where(mask_N, batch["teacher_log_residual"].to(dtype).exp(), 0.0)
            return torch.where(listed_NK, logp_NK.exp(), 0.0), p_other_N
        scaled_NK = logp_NK * (self.store.manifest.temperature / self.settings.temperature)
        p_NK = scaled_NK.masked_fill(~listed_NK, -torch.inf).softmax(1)  # nan in rows without any id, masked below
        return torch.where(listed_NK, p_NK, 0.0), None
