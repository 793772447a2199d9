"""Distillation: a sparse distribution over the vocabulary at every supervised token, from a sample store.

    L = lambda / N_lm  sum_t  CE(y_t, q_t)  +  (1 - lambda) T^2 / N_distill  sum_{t with a row}  CE(p_t, q_t^T)

with q^T = softmax(logits / T), q = q^1, and p the teacher's row, one of two ways:

* `tail: residual`: p keeps the teacher's own probabilities and one more outcome, "any other id", whose student
  probability is the sum over those ids. T must be the store's, because a stored residual cannot be converted.
* `tail: renormalise` (FuseLLM, arXiv:2401.10491; FuseChat, arXiv:2402.16107): p is the softmax over the row's k ids at
  temperature T, whatever temperature it was stored at. The mass of other ids is dropped.

Rows of a `sampled` store (Anshumann et al., arXiv:2503.16870) have no other ids: p is each id's share of the draws,
whose expectation is the teacher's whole distribution. T must be the temperature of the draws.

The distillation term is multiplied by T^2 (Hinton et al., arXiv:1503.02531, section 2.1), so that its gradient keeps
its size as T grows; the cross-entropy on labels is always at temperature 1. The metric `distill` is the mean of
CE(p, q^T) itself, without lambda and without T^2.

If a teacher has another tokenizer, some positions of the target end inside one of its tokens. With `unaligned: label`,
p is the label alone at these positions, as in FuseChat; so with a small lambda the target still learns how its own
tokens continue. With `nothing`, and for samples without a row, such positions have only the label's term.

If a teacher's map has cells (`fusemega.align.cells`), p is a distribution over cells of the target's ids, and q of a
cell is the sum over its ids. A row says nothing of the ids inside a cell, so there the label teaches:

    CE(p_t, q_t) = - sum_c p_t(c) log q_t(c) - p_t(other) log q_t(other) - log q_t(y_t | cell of y_t)

The last term is 0 where the label is alone in its cell. It has no bias, because the label is drawn from the
distribution that is to be learnt. A position whose p is the label alone is the special case of one cell for everything.

Shape suffixes: N supervised positions of a micro-batch (T in the kernel's names), P of one sample, K ids of a row,
H hidden size, V this rank's vocabulary rows, C positions of a chunk, M sums that metrics are made of.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from fusemega.errors import UserError
from fusemega.fusion.evidence import warn_of_bad_rows
from fusemega.fusion.partitions import Partitions
from fusemega.fusion.targets import Tail, Targets, TextEnd, or_label
from fusemega.fusion.teacher_store import TeacherStore, TeacherStoreConfig
from fusemega.logits.groups import Groups
from fusemega.logits.vocab import Query, SparseLogProbs, fused_token_loss, sparse_log_probs
from fusemega.losses.label_probability import label_fields, measured, measures_of
from fusemega.losses.registry import Objective, ObjectiveSettings, register
from fusemega.passes.answers import HiddenStates
from fusemega.passes.micro_batch import MicroBatch

if TYPE_CHECKING:
    from fusemega.text.dataset import TokenizedDataset
    from fusemega.text.sample import Sample
    from fusemega.text.tokenizer import Tokenizer


class TaughtSettings(ObjectiveSettings):
    """What `distill` and `fuse` share."""

    model_config = ConfigDict(populate_by_name=True)

    lambda_: float = Field(0.9, alias="lambda", ge=0, le=1, description="weight of the cross-entropy on labels")
    temperature: float = Field(1.0, gt=0, description="temperature of teacher and student in the distillation term")
    tail: Tail = Field(
        "residual",
        description="mass outside the listed ids: residual keeps it as one more outcome, renormalise scales the "
        "listed ids to sum to 1",
    )
    on_missing: Literal["error", "skip"] = Field(
        "error", description="what to do with a sample that has no row in the store"
    )
    unaligned: Literal["label", "nothing"] = Field(
        "label",
        description="target of a position at which no token of a teacher with another tokenizer ends: its label, "
        "or nothing",
    )
    text_end: TextEnd = Field(
        "label",
        description="what teaches where a plain text ends: its label, or the teacher's row as elsewhere (FuseLLM)",
    )


class Taught(Objective[HiddenStates]):
    """lambda * cross-entropy on labels + (1 - lambda) * T^2 * cross-entropy on `targets`: the loss of this module.

    Args:
        settings: as in the run file.
        k: largest number of ids at a position.
        partitions: those that `targets` are in, by their numbers.
        teachers: those that `targets` come from.
    """

    terms = ("lm", "distill")
    unit = "token"

    def __init__(
        self, settings: TaughtSettings, k: int, partitions: Partitions, teachers: Sequence[TeacherStore]
    ) -> None:
        self.settings, self._k, self._partitions = settings, k, partitions
        self._mapped = any(teacher.map_file is not None for teacher in teachers)
        self.measures = measures_of(self._mapped)
        self._groups: Groups | None = None
        if partitions.num_groups:
            member_E, group_E = torch.from_numpy(partitions.member_E), torch.from_numpy(partitions.group_E)
            self._groups = Groups(member_E, group_E, partitions.num_groups)

    @abstractmethod
    def targets(self, sample: Sample) -> Targets | None:
        """Targets of the sample's supervised positions, at `settings.temperature`; None: there is no row of it.

        Raises:
            UserError: there is no row and `on_missing` is error, or a row does not fit the sample.
        """

    def position_fields(self, sample: Sample) -> dict[str, np.ndarray]:
        """teacher_ids int64 [P, K] (-1: none), teacher_logp fp32 [P, K], teacher_log_residual fp32 [P], teacher_mask,
        and those of `label_fields`.

        If there are cells of several ids, teacher_ids has ids of groups for them, and label_cell int64 [P] is the group
        that the label is in; -1 where the label is alone in its cell, and where no row teaches.

        Raises:
            UserError: as `targets`.
        """
        found, labels_P = self.targets(sample), sample.ids[sample.positions + 1]
        targets = found or Targets.nothing(len(sample.positions), self._k)
        targets, label_cell_P = self._partitions.queries(targets, labels_P)
        of_labels = label_fields(targets, np.where(label_cell_P >= 0, label_cell_P, labels_P))
        cells = {} if self._groups is None else {"label_cell": np.where(targets.mask_P, label_cell_P, -1)}
        if found is not None and self.settings.unaligned == "label":
            targets = or_label(targets, labels_P)
        # Fields have one shape for all samples, and so one K.
        spare = ((0, 0), (0, self._k - targets.ids_PK.shape[1]))
        return {
            "teacher_ids": np.pad(targets.ids_PK, spare, constant_values=-1),
            "teacher_logp": np.pad(targets.logp_PK.astype(np.float32), spare, constant_values=-np.inf),
            "teacher_log_residual": targets.log_residual_P.astype(np.float32),
            "teacher_mask": targets.mask_P,
            **cells,
            **of_labels,
        }

    def counts(self, batch: MicroBatch) -> dict[str, int]:
        return {"lm": len(batch.labels), "distill": int(batch.position_fields["teacher_mask"].sum())}

    def measured(self, batch: MicroBatch) -> dict[str, tuple[float, float]]:
        return measured(batch, self._mapped)

    def loss(
        self, output: HiddenStates, batch: MicroBatch, denominators: Mapping[str, Tensor | float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        settings, fields = self.settings, batch.position_fields
        dtype = torch.promote_types(output.hidden_NH.dtype, torch.float32)
        p_NK, p_other_N = probabilities(fields, settings.tail, dtype)
        lm_weight = settings.lambda_ / denominators["lm"]
        distill_weight = (1.0 - settings.lambda_) * settings.temperature**2 / denominators["distill"]

        def token_loss(results: list[SparseLogProbs], rows: slice) -> tuple[Tensor, Tensor]:
            label, taught, *inside = results
            ce_C = -label.logp_TK[:, 0]
            kd_C = -(p_NK[rows] * taught.logp_TK).sum(1)
            if p_other_N is not None and taught.log_residual_T is not None:
                p_other_C = p_other_N[rows]
                # If every id is listed, the student's residual is -inf and the teacher's mass 0; 0 * -inf is nan.
                kd_C = kd_C - p_other_C * torch.where(p_other_C > 0, taught.log_residual_T, 0.0)
            for within in inside:  # - log q(label | its cell); both columns are 0 where the label is alone in it
                kd_C = kd_C + within.logp_TK[:, 0] - within.logp_TK[:, 1]
            return lm_weight * ce_C + distill_weight * kd_C, torch.stack([ce_C, kd_C], dim=1)

        groups = None if self._groups is None else self._groups.to(output.hidden_NH.device)
        queries = [
            Query(batch.labels[:, None]),
            Query(fields["teacher_ids"], settings.temperature, p_other_N is not None, groups),
        ]
        if groups is not None:
            cell_N = fields["label_cell"]
            label_N = torch.where(cell_N >= 0, batch.labels, -1)
            queries.append(Query(torch.stack([cell_N, label_N], dim=1), settings.temperature, groups=groups))
        loss, sums_M = fused_token_loss(output.hidden_NH, output.weight_VH, queries, token_loss, **output.head)
        return loss, {"lm": sums_M[0], "distill": sums_M[1]}

    @torch.no_grad()
    def distances(self, output: HiddenStates, batch: MicroBatch) -> Tensor:
        """fp64 [2]: sum of KL(p_t, q_t^T) over the positions with a target, in nats, and how many they are.

        Both are compared as outcomes that p tells apart: cells, and "any other id" where p keeps it.
        """
        fields, dtype = batch.position_fields, torch.promote_types(output.hidden_NH.dtype, torch.float32)
        p_NK, p_other_N = probabilities(fields, self.settings.tail, dtype)
        groups = None if self._groups is None else self._groups.to(output.hidden_NH.device)
        query = Query(fields["teacher_ids"], self.settings.temperature, p_other_N is not None, groups)
        found = sparse_log_probs(output.hidden_NH, output.weight_VH, query, **output.head)
        kl_N = torch.where(p_NK > 0, p_NK * (fields["teacher_logp"].to(dtype) - found.logp_TK), 0.0).sum(1)
        if p_other_N is not None:
            assert found.log_residual_T is not None
            apart_N = fields["teacher_log_residual"].to(dtype) - found.log_residual_T
            kl_N = kl_N + torch.where(p_other_N > 0, p_other_N * apart_N, 0.0)
        return torch.stack([kl_N.double().sum(), fields["teacher_mask"].double().sum()])


def probabilities(fields: Mapping[str, Tensor], tail: Tail, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The rows as probabilities [N, K], and that of all other ids [N] if it is kept; 0 where there is no row."""
    mask_N = fields["teacher_mask"]
    listed_NK = (fields["teacher_ids"] >= 0) & mask_N[:, None]
    p_NK = torch.where(listed_NK, fields["teacher_logp"].to(dtype).exp(), 0.0)
    if tail == "renormalise":
        return p_NK, None
    return p_NK, torch.where(mask_N, fields["teacher_log_residual"].to(dtype).exp(), 0.0)


@register("distill")
class Distill(Taught):
    """One teacher's stored rows.

    Args:
        settings: as in the run file.
        store: the open store.
    """

    class Settings(TaughtSettings, TeacherStoreConfig):
        name: Literal["distill"] = "distill"

    def __init__(self, settings: Distill.Settings, store: TeacherStore) -> None:
        super().__init__(settings, store.k, Partitions([store.cell_V], store.vocab_size), [store])
        self.store = store

    @classmethod
    def build(cls, settings: Distill.Settings, tokenizer: Tokenizer, vocab_size: int) -> Distill:
        store = TeacherStore(
            settings, "objective", tokenizer, vocab_size, settings.temperature, settings.tail, settings.text_end
        )
        # With a map some draws' ids have no counterpart in the target's vocabulary, so there is a tail.
        sampled = store.store.manifest.rows == "sampled"
        if sampled and settings.map is None and "tail" in settings.model_fields_set:
            raise UserError(
                f"objective.tail: no effect with {settings.store}, whose rows are samples from the whole "
                "distribution; leave it out"
            )
        return cls(settings, store)

    def targets(self, sample: Sample) -> Targets | None:
        row = self.store.row(sample, self.settings.on_missing == "error")
        if row is None:
            return None
        return replace(self.store.targets(row, sample), partition=self._partitions.numbers[0])

    def identity(self, dataset: TokenizedDataset) -> dict[str, Any]:
        return self.store.identity(dataset)

    def check_data(self, dataset: TokenizedDataset) -> None:
        self.store.check_data(dataset, self.settings.on_missing == "error")
        warn_of_bad_rows(self.store, dataset)
