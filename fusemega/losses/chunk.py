"""Likelihoods of aligned chunks, from a teacher with any tokenizer: ALM (Minixhofer et al., arXiv:2503.20083).

A chunk is the text between two neighbouring positions at which both tokenizations end a token, or between the last such
position and the sample's end. Both models read it as whole tokens, after the same text. With P its probability for the
teacher (the product of its tokens' probabilities) and Q for the model in training, and p = P^(1/tau), q = Q^(1/tau):

    L = lambda / N_lm  sum_t CE(y_t, q_t)  +  (1 - lambda) tau / N_chunk  sum_chunks  D((p, 1 - p), (q, 1 - q))

D compares two outcomes, "this chunk" and "anything else": a binarised f-divergence.

* `kl`: p log(p / q) + (1 - p) log((1 - p) / (1 - q)). The released code (tokenkit, `binary_ce`) leaves out the term
  p log p + (1 - p) log(1 - p), which has no gradient; here D is 0 where both agree.
* `reverse_kl`: the same with p and q exchanged (`reverse_binary_kl`).
* `total_variation`: |p - q| (`abs_exp`).

As in the released code tau is 100 by default, 1e-6 is subtracted from both log-probs, so that log(1 - q) is finite, and
each chunk counts once, however long it is. With a growing tau more weight goes to improbable chunks.

Decided here: the factor tau, with which the gradient keeps its size as tau grows (tau x KL has the limit that tokenkit
calls `binary_kl_temp_limit`); the chunks, which come from byte offsets, so the tokens before the first shared position
are in none; and `text_end: label`, by which the eos behind a plain text is in none either. Not reproduced: the
debiasing of chunks by their next token's probability (`unbiased`, `space` in tokenkit; it needs the whole of the
teacher's distribution), hidden states, and GradMag.

The teacher's log-probs of the text's own tokens are those of its store (`Row.label_logp_P`, at temperature 1); the
other entries of its rows are not used.

Shape suffixes: N supervised positions of a micro-batch, P of one sample, M chunks of one sample, G places for chunks,
as many as positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from fusemega.align.positions import shared_positions
from fusemega.fusion.targets import TextEnd, text_ends
from fusemega.fusion.teacher_rows import TeacherRows, TeacherRowsConfig
from fusemega.logits.vocab import Query, sparse_log_probs
from fusemega.losses.registry import Objective, ObjectiveSettings, register
from fusemega.passes.answers import HiddenStates
from fusemega.passes.micro_batch import MicroBatch

if TYPE_CHECKING:
    from fusemega.text.dataset import TokenizedDataset
    from fusemega.text.sample import Sample
    from fusemega.text.tokenizer import Tokenizer

EPSILON = 1e-6
Binarised = Literal["kl", "reverse_kl", "total_variation"]


@register("chunk")
class ChunkLikelihood(Objective[HiddenStates]):
    """lambda * cross-entropy on labels + (1 - lambda) * tau * binarised divergence of aligned chunks.

    Args:
        settings: as in the run file.
        teacher: the open store.
        eos_id: the target's token behind a plain text; None for none.
    """

    class Settings(ObjectiveSettings, TeacherRowsConfig):
        model_config = ConfigDict(populate_by_name=True)

        name: Literal["chunk"] = "chunk"
        divergence: Binarised = Field(
            "kl", description="kl: KL(teacher, student) of the two outcomes; reverse_kl; or total_variation"
        )
        binarization_temperature: float = Field(
            100.0, gt=0, description="tau: a chunk's probability is taken to the power 1 / tau"
        )
        lambda_: float = Field(0.9, alias="lambda", ge=0, le=1, description="weight of the cross-entropy on labels")
        on_missing: Literal["error", "skip"] = Field(
            "error", description="what to do with a sample that has no row in the store"
        )
        text_end: TextEnd = Field(
            "label", description="whether the eos behind a plain text is in no chunk (label), or is a chunk (row)"
        )

    terms = ("lm", "chunk")
    unit = "token"
    splits_samples = False

    def __init__(self, settings: ChunkLikelihood.Settings, teacher: TeacherRows, eos_id: int | None) -> None:
        self.settings, self.teacher = settings, teacher
        self._eos_id = eos_id if settings.text_end == "label" else None

    @classmethod
    def build(cls, settings: ChunkLikelihood.Settings, tokenizer: Tokenizer, vocab_size: int) -> ChunkLikelihood:
        return cls(settings, TeacherRows(settings, "objective", labels_for="objective.name chunk"), tokenizer.eos_id)

    def identity(self, dataset: TokenizedDataset) -> dict[str, Any]:
        return self.teacher.identity(dataset)

    def check_data(self, dataset: TokenizedDataset) -> None:
        self.teacher.check_rows(dataset, self.settings.on_missing == "error", lambda row, sample: None)

    def position_fields(self, sample: Sample) -> dict[str, np.ndarray]:
        """chunk_starts and in_chunk bool [P]; chunk_logp fp32 [P], at a chunk's start the teacher's log-prob of it.

        Raises:
            UserError: there is no row and `on_missing` is error, or the row has no labels.
        """
        count = len(sample.positions)
        starts_P, logp_P = np.zeros(count, dtype=bool), np.zeros(count, dtype=np.float32)
        row = self.teacher.row(sample, self.settings.on_missing == "error")
        if row is not None:
            assert row.label_logp_P is not None
            source_M, target_M = shared_positions(row.end_bytes, sample.end_bytes[sample.positions])
            if len(source_M):
                starts_P[target_M] = True
                logp_P[target_M] = np.add.reduceat(row.label_logp_P.astype(np.float64), source_M)
        in_chunk_P = np.logical_or.accumulate(starts_P)
        if self._eos_id is not None:
            ends_P = text_ends(sample, self._eos_id)
            starts_P, in_chunk_P, logp_P = starts_P & ~ends_P, in_chunk_P & ~ends_P, np.where(ends_P, 0.0, logp_P)
        return {"chunk_starts": starts_P, "in_chunk": in_chunk_P, "chunk_logp": logp_P.astype(np.float32)}

    def counts(self, batch: MicroBatch) -> dict[str, int]:
        return {"lm": len(batch.labels), "chunk": int(batch.position_fields["chunk_starts"].sum())}

    def loss(
        self, output: HiddenStates, batch: MicroBatch, denominators: Mapping[str, Tensor | float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        settings, fields = self.settings, batch.position_fields
        query = Query(batch.labels[:, None])
        logp_N = sparse_log_probs(output.hidden_NH, output.weight_VH, query, **output.head).logp_TK[:, 0]
        place_N = places(fields["chunk_starts"])
        student_G = summed(torch.where(fields["in_chunk"], logp_N, 0.0), place_N)
        teacher_G = summed(fields["chunk_logp"].to(logp_N.dtype), place_N)
        tau = settings.binarization_temperature
        divergence_G = binarised(settings.divergence, teacher_G / tau, student_G / tau)
        # Places without a chunk compare 0 with 0.
        ce, divergence = -logp_N.sum(), divergence_G.sum()
        loss = settings.lambda_ * ce / denominators["lm"]
        loss = loss + (1.0 - settings.lambda_) * tau * divergence / denominators["chunk"]
        return loss, {"lm": ce.detach(), "chunk": divergence.detach()}


def places(starts_N: Tensor) -> Tensor:
    """int64 [N]: the number of each position's chunk, counted over the micro-batch; 0 before the first."""
    return (starts_N.long().cumsum(0) - 1).clamp(min=0)


def summed(values_N: Tensor, place_N: Tensor) -> Tensor:
    """[G]: the sum over each chunk's positions; 0 at places past the last chunk."""
    return torch.zeros_like(values_N).index_add(0, place_N, values_N)


def binarised(kind: Binarised, teacher_G: Tensor, student_G: Tensor) -> Tensor:
    """The divergence of two outcomes, "this" and "anything else", from the log-probs (<= 0) of the first.

    Example: probabilities 0.9 and 0.9; 0.9 and 0.5.

        >>> teacher, student = torch.tensor([0.9, 0.9]).log(), torch.tensor([0.9, 0.5]).log()
        >>> [f"{x:.3f}" for x in binarised("total_variation", teacher, student).tolist()]
        ['0.000', '0.400']
        >>> [f"{x:.3f}" for x in binarised("kl", teacher, student).tolist()]
        ['0.000', '0.368']
    """
    if kind == "reverse_kl":
        teacher_G, student_G = student_G, teacher_G
    logp_G, logq_G = teacher_G.clamp(max=0) - EPSILON, student_G.clamp(max=0) - EPSILON
    if kind == "total_variation":
        return (logp_G.exp() - logq_G.exp()).abs()
    other_G = -torch.expm1(logp_G) * (_log1mexp(logp_G) - _log1mexp(logq_G))
    return logp_G.exp() * (logp_G - logq_G) + other_G


def _log1mexp(x_G: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact at both ends."""
    near_G = x_G > -0.6931471805599453
    # Where the other branch is taken, a harmless number keeps its gradient finite.
    small_G, large_G = torch.where(near_G, x_G, -0.5), torch.where(near_G, -1.0, x_G)
    return torch.where(near_G, torch.log(-torch.expm1(small_G)), torch.log1p(-torch.exp(large_G)))
