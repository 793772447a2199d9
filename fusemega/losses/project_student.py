"""P-KL of X-Token (Sreenivas et al., arXiv:2605.21699): distillation in the teacher's vocabulary, into which the
probabilities of the model in training are projected.

    L = lambda / N_lm  sum_t CE(y_t, q_t)  +  (1 - lambda) T^2 / N_distill  sum_{t with a row} CE(p_t, q_t^T W)

with q^T = softmax(logits / T), p the teacher's row over its own ids, and W the sparse matrix of
`fusemega.align.student_projection`: a token of both vocabularies gives its probability to itself, a token that the
teacher writes in several tokens gives 0.9 * 0.1^i to the i-th of them, rows scaled to sum to 1.

* `tail: residual`: one more outcome, "any other id", has the rest of both: of p, and of q what W gives to no listed id.
* `tail: renormalise`: p and the projected q are both scaled to sum to 1 over the listed ids, as published.

As published: W, the KL from the teacher to the projected student, its factor T^2 and its mean over aligned places. The
cross-entropy is KL plus the teacher's entropy, which has no gradient. Decided here:

* Places are the positions at which both tokenizations end a token. The published code averages probabilities of the
  student, and log-probabilities of the teacher, over the positions of an aligned chunk of several tokens.
* The listed ids are the k most probable ones at each position; in the published code, of a whole micro-batch.
* `tail: residual` is the default, as in `distill`, and `unaligned: label` teaches the other positions their label.
* At the first token of a content, if only one of the two tokenizers puts a space there, a position is not aligned:
  the tokens of W do not stand for the same text there.
* What W leaves out (see there).
* `text_end: label`, as in `distill`.

With the teacher's tokenizer W is the identity, and the loss is that of `distill`.

Shape suffixes: N supervised positions of a micro-batch (T in the kernel's names), P of one sample, K ids of a row,
M positions at which both tokenizations end a token, C positions of a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fusemega.align.pieces import cutter
from fusemega.align.positions import shared_positions
from fusemega.align.projection import log_sum
from fusemega.align.student_projection import StudentProjection, student_projection
from fusemega.align.vocabulary import Vocabulary
from fusemega.errors import UserError
from fusemega.fusion.targets import Targets, or_label, renormalised, text_ends
from fusemega.fusion.teacher_rows import TeacherRows, TeacherRowsConfig
from fusemega.logits.groups import Groups
from fusemega.logits.vocab import Query, SparseLogProbs, fused_token_loss
from fusemega.losses.distill import TaughtSettings, probabilities
from fusemega.losses.registry import Objective, register
from fusemega.passes.answers import HiddenStates
from fusemega.passes.micro_batch import MicroBatch
from fusemega.text.sample import BEGINS, OF_TEXT
from fusemega.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from fusemega.store import Row
    from fusemega.text.dataset import TokenizedDataset
    from fusemega.text.sample import Sample


@register("project_student")
class ProjectStudent(Objective[HiddenStates]):
    """lambda * cross-entropy on labels + (1 - lambda) * T^2 * cross-entropy in the teacher's vocabulary.

    Args:
        settings: as in the run file.
        teacher: the open store.
        projection: W.
        eos_id: the target's token behind a plain text; None for none.
    """

    class Settings(TaughtSettings, TeacherRowsConfig):
        name: Literal["project_student"] = "project_student"
        tokenizer: str = Field(description="the teacher's tokenizer: a folder or hub id")
        max_pieces: int = Field(
            4, ge=1, description="the first so many of a token's pieces get a part of its probability"
        )

    terms = ("lm", "distill")
    unit = "token"

    def __init__(
        self,
        settings: ProjectStudent.Settings,
        teacher: TeacherRows,
        projection: StudentProjection,
        eos_id: int | None,
    ) -> None:
        self.settings, self.teacher, self.projection = settings, teacher, projection
        teacher.check_temperature(settings.temperature, settings.tail)
        parts = (projection.members_E, projection.group_E, projection.weight_E)
        members_E, group_E, weight_E = map(torch.from_numpy, parts)
        self._groups = Groups(members_E, group_E, projection.num_groups, weight_E)
        self._eos_id = eos_id if settings.text_end == "label" else None

    @classmethod
    def build(cls, settings: ProjectStudent.Settings, tokenizer: Tokenizer, vocab_size: int) -> ProjectStudent:
        teacher = TeacherRows(settings, "objective")
        theirs, manifest = Tokenizer.load(settings.tokenizer), teacher.store.manifest
        if theirs.content_hash != manifest.tokenizer:
            raise UserError(
                f"objective.tokenizer: {settings.tokenizer} is not the tokenizer of the store {teacher.store.path} "
                f"(store {manifest.tokenizer[:12]}, tokenizer {theirs.content_hash[:12]})"
            )
        student, other = Vocabulary.of(tokenizer), Vocabulary.of(theirs)
        cut = cutter(theirs, other)
        projection = student_projection(student, other, cut, vocab_size, manifest.vocab_size, settings.max_pieces)
        return cls(settings, teacher, projection, tokenizer.eos_id)

    def identity(self, dataset: TokenizedDataset) -> dict[str, Any]:
        return self.teacher.identity(dataset) | {"tokenizer": self.projection.content_hash}

    def check_data(self, dataset: TokenizedDataset) -> None:
        self.teacher.check_rows(dataset, self.settings.on_missing == "error", self._targets)

    def position_fields(self, sample: Sample) -> dict[str, np.ndarray]:
        """teacher_ids int64 [P, K], ids and groups of the kernel (-1: none); teacher_logp fp32 [P, K],
        teacher_log_residual fp32 [P], teacher_mask bool [P] (False: taught nothing), teacher_row bool [P] (False: not
        from a row).

        Raises:
            UserError: there is no row and `on_missing` is error.
        """
        row = self.teacher.row(sample, self.settings.on_missing == "error")
        if row is None:
            targets = Targets.nothing(len(sample.positions), self.teacher.k)
        else:
            targets = self._targets(row, sample)
        row_P = targets.mask_P
        if row is not None and self.settings.unaligned == "label":
            targets = or_label(targets, sample.ids[sample.positions + 1])
        return {
            "teacher_ids": targets.ids_PK,
            "teacher_logp": targets.logp_PK.astype(np.float32),
            "teacher_log_residual": targets.log_residual_P.astype(np.float32),
            "teacher_mask": targets.mask_P,
            "teacher_row": row_P,
        }

    def _targets(self, row: Row, sample: Sample) -> Targets:
        settings, positions_P = self.settings, sample.positions
        source_M, target_M = shared_positions(row.end_bytes, sample.end_bytes[positions_P])
        of_text = bool(sample.is_place(OF_TEXT).any())
        if not (self.projection.same_text if of_text else self.projection.same_start):
            kept_M = ~sample.is_place(BEGINS)[positions_P[target_M]]
            source_M, target_M = source_M[kept_M], target_M[kept_M]
        logp_PK = row.logp_PK.astype(np.float64)
        if settings.tail == "renormalise":
            # log p at the new temperature, up to a constant that `renormalised` takes away.
            logp_PK *= self.teacher.store.manifest.temperature / settings.temperature
        # No two ids meet, so `project` is not needed, and the log-probs keep their bits.
        ids_MK, logp_MK = row.ids_PK[source_M], logp_PK[source_M]
        ids_MK = np.where(ids_MK >= 0, self.projection.table_S[ids_MK], -1)
        # Ids onto which nothing is projected become a part of "any other id".
        dropped_M = log_sum(np.where(ids_MK < 0, logp_MK, -np.inf))
        log_residual_M = np.logaddexp(row.log_residual_P[source_M], dropped_M)
        logp_MK = np.where(ids_MK >= 0, logp_MK, -np.inf)
        targets = Targets.nothing(len(positions_P), row.ids_PK.shape[1])
        targets.ids_PK[target_M], targets.logp_PK[target_M] = ids_MK, logp_MK
        targets.log_residual_P[target_M] = log_residual_M
        targets.mask_P[target_M] = (ids_MK >= 0).any(1)
        if self._eos_id is not None:
            targets = replace(targets, mask_P=targets.mask_P & ~text_ends(sample, self._eos_id))
        return renormalised(targets) if settings.tail == "renormalise" else targets

    def counts(self, batch: MicroBatch) -> dict[str, int]:
        return {"lm": len(batch.labels), "distill": int(batch.position_fields["teacher_mask"].sum())}

    def loss(
        self, output: HiddenStates, batch: MicroBatch, denominators: Mapping[str, Tensor | float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        settings, fields = self.settings, batch.position_fields
        dtype = torch.promote_types(output.hidden_NH.dtype, torch.float32)
        p_NK, p_other_N = probabilities(fields, settings.tail, dtype)
        lm_weight = settings.lambda_ / denominators["lm"]
        distill_weight = (1.0 - settings.lambda_) * settings.temperature**2 / denominators["distill"]

        def token_loss(results: list[SparseLogProbs], rows: slice) -> tuple[Tensor, Tensor]:
            label, taught = results
            ce_C = -label.logp_TK[:, 0]
            kd_C = -(p_NK[rows] * taught.logp_TK).sum(1)
            if p_other_N is not None and taught.log_residual_T is not None:
                p_other_C = p_other_N[rows]
                # If every id is listed, the student's residual is -inf and the teacher's mass 0; 0 * -inf is nan.
                kd_C = kd_C - p_other_C * torch.where(p_other_C > 0, taught.log_residual_T, 0.0)
            else:
                # q over the listed ids sums to 1 in rows; a label by itself keeps its probability.
                scaled_C, listed_CK = fields["teacher_row"][rows], fields["teacher_ids"][rows] >= 0
                logq_CK = torch.where(listed_CK | ~scaled_C[:, None], taught.logp_TK, -torch.inf)
                kd_C = kd_C + torch.where(scaled_C, logq_CK.logsumexp(1), 0.0)
            return lm_weight * ce_C + distill_weight * kd_C, torch.stack([ce_C, kd_C], dim=1)

        groups = self._groups.to(output.hidden_NH.device)
        queries = [
            Query(batch.labels[:, None]),
            Query(fields["teacher_ids"], settings.temperature, p_other_N is not None, groups),
        ]
        loss, sums_M = fused_token_loss(output.hidden_NH, output.weight_VH, queries, token_loss, **output.head)
        return loss, {"lm": sums_M[0], "distill": sums_M[1]}
