"""Merged distributions of aligned groups of tokens: GOLD, as in TRL (trl.experimental.gold, `ULDLoss` with
`use_extended_uld` and `uld_use_hybrid_loss`; its sorted L1 is ULD's, Boizard et al., arXiv:2402.12030).

A group is the text between two neighbouring positions at which both tokenizations end a token, or between the last such
position and the sample's end. For each model the group's tokens are merged into one distribution, by the chain rule:

* `observed` (TRL's default): the first position's distribution, times the probabilities of the tokens that follow.
* `bayesian`: the last position's distribution, times the probabilities of the tokens before it.

It does not sum to 1. With P and Q the teacher's and the student's, and each probability that is multiplied at least
1e-8 (as in TRL),

    L = lambda / N_lm  sum_t CE(y_t, q_t)
        + (1 - lambda) / N_merge  sum_groups  ( w_m D(P, Q) + w_u sum_j |P_(j) - Q_(j)| )

D compares ids that both vocabularies have, as TRL's generalised Jensen-Shannon divergence. With
M = beta P + (1 - beta) Q it is beta sum P log(P / M) + (1 - beta) sum Q log(Q / M); beta = 0 is sum P log(P / Q), and
beta = 1 sum Q log(Q / P). The last sum is over the ids that the other vocabulary lacks, those of each model sorted by
falling probability. By default w_m is the share of the teacher's ids that the target has too, and w_u = 1 - w_m.

A store's rows do not tell the probabilities of ids that the teacher did not list. So D is over the matched ids among
the k listed, and the sorted sum over the k largest Q; a row with fewer unmatched ids is filled up with 0. TRL sums over
both whole vocabularies. Decided here: groups come from byte offsets, tokens before the first shared position are in
none, temperatures are 1, the end of a turn is a token like others (TRL leaves eos out), and matched ids are those of a
map of kind `exact`, by bytes and role. With `text_end: label` the eos behind a plain text is in no group. As in TRL, a
space that only one tokenizer puts before a content is not looked at.

Shape suffixes: N supervised positions of a micro-batch, P of one sample, M groups of one sample, K ids of a row, J
matched ids of a row, S ids of the teacher's vocabulary, G places for groups, as many as positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor

from fusemega.align.positions import shared_positions
from fusemega.align.projection import project
from fusemega.align.vocabulary_map import VocabularyMap
from fusemega.errors import UserError
from fusemega.fusion.targets import TextEnd, text_ends
from fusemega.fusion.teacher_rows import TeacherRows, TeacherRowsConfig
from fusemega.logits.topk import top_ids
from fusemega.logits.vocab import Query, sparse_log_probs
from fusemega.losses.chunk import places, summed
from fusemega.losses.registry import Objective, ObjectiveSettings, register
from fusemega.passes.answers import HiddenStates
from fusemega.passes.micro_batch import MicroBatch

if TYPE_CHECKING:
    from fusemega.store import Row
    from fusemega.text.dataset import TokenizedDataset
    from fusemega.text.sample import Sample
    from fusemega.text.tokenizer import Tokenizer

LEAST = math.log(1e-8)


@register("merge")
class MergedGroups(Objective[HiddenStates]):
    """lambda * cross-entropy on labels + (1 - lambda) * the distance of merged distributions.

    Args:
        settings: as in the run file.
        teacher: the open store.
        table_S: the target's id of each teacher id, or -1.
        vocab_size: that of the model in training.
        eos_id: the target's token behind a plain text; None for none.
    """

    class Settings(ObjectiveSettings, TeacherRowsConfig):
        model_config = ConfigDict(populate_by_name=True)

        name: Literal["merge"] = "merge"
        map: str | None = Field(
            None,
            description="vocabulary map from `fusemega align --kind exact`; default: none, the store has the target's "
            "own tokenizer",
        )
        token_merge_strategy: Literal["observed", "bayesian"] = Field(
            "observed",
            description="observed: the group's first distribution times the following tokens' probabilities; bayesian: "
            "the last one times those of the tokens before",
        )
        beta: float = Field(
            0.5, ge=0, le=1, description="matched ids: 0 is KL(teacher, student), 1 KL(student, teacher), between: JSD"
        )
        matched_weight: float | None = Field(
            None, ge=0, description="weight of matched ids; default: the share of the teacher's ids that are matched"
        )
        unmatched_weight: float | None = Field(
            None, ge=0, description="weight of the sorted others; default: 1 - that share; give both or none"
        )
        lambda_: float = Field(0.9, alias="lambda", ge=0, le=1, description="weight of the cross-entropy on labels")
        on_missing: Literal["error", "skip"] = Field(
            "error", description="what to do with a sample that has no row in the store"
        )
        text_end: TextEnd = Field(
            "label", description="whether the eos behind a plain text is in no group (label), or is a group (row)"
        )

        @model_validator(mode="after")
        def _both_weights(self) -> MergedGroups.Settings:
            """matched_weight and unmatched_weight are given together or not at all."""
            if (self.matched_weight is None) != (self.unmatched_weight is None):
                raise ValueError("matched_weight and unmatched_weight: give both, or none")
            return self

    terms = ("lm", "merge")
    unit = "token"
    splits_samples = False

    def __init__(
        self,
        settings: MergedGroups.Settings,
        teacher: TeacherRows,
        table_S: np.ndarray,
        vocab_size: int,
        eos_id: int | None,
    ) -> None:
        self.settings, self.teacher, self._table_S = settings, teacher, table_S
        self._eos_id = eos_id if settings.text_end == "label" else None
        manifest = teacher.store.manifest
        if manifest.rows != "top_k" or manifest.temperature != 1.0:
            raise UserError(
                f"objective.store: {teacher.store.path} has rows: {manifest.rows} at temperature "
                f"{manifest.temperature}; merge needs rows: top_k at 1.0"
            )
        self._matched = torch.zeros(vocab_size, dtype=torch.bool)
        self._matched[torch.from_numpy(table_S[table_S >= 0].astype(np.int64))] = True
        share = float((table_S >= 0).mean())
        self._weights = share, 1.0 - share
        if settings.matched_weight is not None and settings.unmatched_weight is not None:
            self._weights = settings.matched_weight, settings.unmatched_weight

    @classmethod
    def build(cls, settings: MergedGroups.Settings, tokenizer: Tokenizer, vocab_size: int) -> MergedGroups:
        teacher = TeacherRows(settings, "objective", labels_for="objective.name merge")
        manifest = teacher.store.manifest
        if settings.map is None:
            teacher.store.check({"tokenizer": tokenizer.content_hash})
            table_S = np.arange(manifest.vocab_size)
        else:
            loaded = VocabularyMap.load(Path(settings.map))
            if loaded.kind != "exact":
                raise UserError(
                    f"{settings.map}: the map's kind is {loaded.kind}; merge needs `fusemega align --kind exact`"
                )
            scorer = manifest.tokenizer, f"that of the store {teacher.store.path}"
            loaded.check(settings.map, scorer, (tokenizer.content_hash, tokenizer.source), target_ids=tokenizer.num_ids)
            spare = max(0, manifest.vocab_size - loaded.source_size)
            table_S = np.pad(loaded.table_S, (0, spare), constant_values=-1)
        return cls(settings, teacher, np.where(table_S < vocab_size, table_S, -1), vocab_size, tokenizer.eos_id)

    def identity(self, dataset: TokenizedDataset) -> dict[str, Any]:
        of_map = None if self.settings.map is None else VocabularyMap.load(Path(self.settings.map)).content_hash
        return self.teacher.identity(dataset) | {"map": of_map}

    def check_data(self, dataset: TokenizedDataset) -> None:
        self.teacher.check_rows(dataset, self.settings.on_missing == "error", lambda row, sample: None)

    def position_fields(self, sample: Sample) -> dict[str, np.ndarray]:
        """chunk_starts and in_chunk bool [P], as of `chunk`; merge_base bool [P], the position of each group whose
        distribution is used. There: teacher_ids int64 [P, K] (-1: none) and teacher_logp fp32 [P, K] of matched ids;
        unmatched_p fp32 [P, K], by falling probability, then 0.

        Raises:
            UserError: there is no row and `on_missing` is error, or the row has no labels.
        """
        count, k = len(sample.positions), self.teacher.k
        starts_P, base_P = np.zeros(count, dtype=bool), np.zeros(count, dtype=bool)
        ids_PK, logp_PK = np.full((count, k), -1, dtype=np.int64), np.full((count, k), -np.inf, dtype=np.float32)
        unmatched_PK = np.zeros((count, k), dtype=np.float32)
        row = self.teacher.row(sample, self.settings.on_missing == "error")
        if row is not None:
            source_M, target_M = shared_positions(row.end_bytes, sample.end_bytes[sample.positions])
            starts_P[target_M] = True
            base_M = target_M if self.settings.token_merge_strategy == "observed" else _lasts(target_M, count)
            base_P[base_M] = True
            ids_PK[base_M], logp_PK[base_M], unmatched_PK[base_M] = self._merged(row, source_M)
        in_chunk_P = np.logical_or.accumulate(starts_P)
        if self._eos_id is not None:  # a group of its own: the position before it ends at the text's last byte
            kept_P = ~text_ends(sample, self._eos_id)
            starts_P, in_chunk_P, base_P = starts_P & kept_P, in_chunk_P & kept_P, base_P & kept_P
        return {
            "chunk_starts": starts_P,
            "in_chunk": in_chunk_P,
            "merge_base": base_P,
            "teacher_ids": ids_PK,
            "teacher_logp": logp_PK,
            "unmatched_p": unmatched_PK,
        }

    def _merged(self, row: Row, source_M: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The teacher's merged distribution of each group: matched ids, their log-probs, and the others' sorted."""
        assert row.label_logp_P is not None
        if not len(source_M):
            nothing = np.empty((0, row.ids_PK.shape[1]))
            return nothing, nothing, nothing
        label_P = np.maximum(row.label_logp_P.astype(np.float64), LEAST)
        base_M = source_M
        if self.settings.token_merge_strategy == "bayesian":
            base_M = _lasts(source_M, row.num_tokens)
        others_M = np.add.reduceat(label_P, source_M) - label_P[base_M]
        logp_MK = row.logp_PK[base_M] + others_M[:, None]
        unmatched_MK = np.where(self._table_S[row.ids_PK[base_M]] < 0, np.exp(logp_MK), 0.0)
        ids_MK, logp_MK, _ = project(row.ids_PK[base_M], logp_MK, row.log_residual_P[base_M], self._table_S)
        return ids_MK, logp_MK, -np.sort(-unmatched_MK, axis=1)

    def counts(self, batch: MicroBatch) -> dict[str, int]:
        return {"lm": len(batch.labels), "merge": int(batch.position_fields["merge_base"].sum())}

    def loss(
        self, output: HiddenStates, batch: MicroBatch, denominators: Mapping[str, Tensor | float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        settings, fields, hidden_NH = self.settings, batch.position_fields, output.hidden_NH
        matched_NK, k = fields["teacher_ids"], self.teacher.k
        most = min(k, len(self._matched))
        self._matched = self._matched.to(hidden_NH.device)  # copied the first time
        largest_NK = top_ids(hidden_NH, output.weight_VH, most, self._matched, **output.head)
        query = Query(torch.cat([batch.labels[:, None], matched_NK, largest_NK], dim=1))
        logp_NK = sparse_log_probs(hidden_NH, output.weight_VH, query, **output.head).logp_TK
        label_N, base_N = logp_NK[:, 0], fields["merge_base"]
        place_N = places(fields["chunk_starts"])
        others_N = torch.where(fields["in_chunk"] & ~base_N, label_N.clamp(min=LEAST), 0.0)
        logq_NK = logp_NK[:, 1:] + summed(others_N, place_N)[place_N][:, None]
        listed_NK = (matched_NK >= 0) & base_N[:, None] & fields["teacher_logp"].isfinite()
        divergence_N = generalised_jsd(
            fields["teacher_logp"].to(logp_NK.dtype), logq_NK[:, :k], listed_NK, settings.beta
        )
        q_NK = torch.where((largest_NK >= 0) & base_N[:, None], logq_NK[:, k:].exp(), 0.0)
        distance_N = (fields["unmatched_p"][:, :most].to(q_NK.dtype) - q_NK).abs().sum(1)
        merged = (self._weights[0] * divergence_N + self._weights[1] * distance_N).sum()
        ce = -label_N.sum()
        loss = settings.lambda_ * ce / denominators["lm"] + (1.0 - settings.lambda_) * merged / denominators["merge"]
        return loss, {"lm": ce.detach(), "merge": merged.detach()}


def generalised_jsd(logp_NJ: Tensor, logq_NJ: Tensor, listed_NJ: Tensor, beta: float) -> Tensor:
    """[N]: the divergence D of this module over the listed entries, from log-probs that need not sum to 1.

    Example: one entry with P = 0.5 and Q = 0.25.

        >>> p, q, listed = torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log(), torch.tensor([[True]])
        >>> [f"{generalised_jsd(p, q, listed, beta).item():.3f}" for beta in (0.0, 0.5, 1.0)]
        ['0.347', '0.021', '-0.173']
    """
    # What is not listed compares 1 with 1, and its gradient is 0.
    logp_NJ, logq_NJ = torch.where(listed_NJ, logp_NJ, 0.0), torch.where(listed_NJ, logq_NJ, 0.0)
    if beta == 0.0:
        return (logp_NJ.exp() * (logp_NJ - logq_NJ)).sum(1)
    if beta == 1.0:
        return (logq_NJ.exp() * (logq_NJ - logp_NJ)).sum(1)
    logm_NJ = torch.logaddexp(logp_NJ + math.log(beta), logq_NJ + math.log1p(-beta))
    return (beta * logp_NJ.exp() * (logp_NJ - logm_NJ) + (1 - beta) * logq_NJ.exp() * (logq_NJ - logm_NJ)).sum(1)


def _lasts(starts_M: np.ndarray, count: int) -> np.ndarray:
    """The last position of each group of which the first is given, of `count` positions."""
    return np.append(starts_M[1:], count) - 1
