"""The few numbers of each token that answer its queries, reduced over the ranks: peaks first, then sums.

Shape suffixes: C tokens of a chunk, V this rank's real vocabulary rows, B rows of one vocabulary block, K entries of a
query.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from fusemega.logits._members import ListedMembers
from fusemega.logits._query import Query, SparseLogProbs, Sums

if TYPE_CHECKING:
    from fusemega.logits._head import ChunkedHead


def reduce_together(
    heads: Sequence[tuple[ChunkedHead, Tensor, Sequence[Query]]],
) -> list[tuple[list[SparseLogProbs], list[Sums]]]:
    """`ChunkedHead.reduce` of several heads' logits of the same tokens, with one max- and one sum-all-reduce in all."""
    group = heads[0][0].group
    chunks = [_Chunk(head, logits_CV, queries) for head, logits_CV, queries in heads]
    peaks = all_reduced([chunk.peaks() for chunk in chunks], dist.ReduceOp.MAX, group)
    sums = all_reduced([chunk.sums(peak) for chunk, peak in zip(chunks, peaks, strict=True)], dist.ReduceOp.SUM, group)
    return [chunk.answers(*found) for chunk, *found in zip(chunks, peaks, sums, strict=True)]


def all_reduced(parts: Sequence[Tensor], op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> list[Tensor]:
    """This rank's tensors [n, C], reduced over the group (None: left alone) by one all-reduce."""
    packed = torch.cat(list(parts))
    if group is not None and packed.numel():
        dist.all_reduce(packed, op=op, group=group)
    return list(packed.split([len(part) for part in parts]))


class _Chunk:
    """One head's logits of a chunk, and the queries about them.

    Rows of `peaks`: the vocabulary; each query's residual; the entries of each query with groups.
    Rows of `sums`: each temperature; each query's residual; the entries of each query (logits, if it has no groups).
    """

    def __init__(self, head: ChunkedHead, logits_CV: Tensor, queries: Sequence[Query]) -> None:
        self._head, self._logits_CV = head, logits_CV
        self._listed = head.listed(logits_CV, queries)
        self._grouped = [listed for listed in self._listed if isinstance(listed, ListedMembers)]
        self._residuals = [listed for listed in self._listed if listed.query.residual]
        self._temperatures = sorted({query.temperature for query in queries})

    def peaks(self) -> Tensor:
        """Largest logits on this rank."""
        logits_CV = self._logits_CV
        peaks = logits_CV.new_full((1 + len(self._residuals), logits_CV.shape[0]), -torch.inf)
        for block in self._head.blocks:
            logits_CB = logits_CV[:, block]
            torch.maximum(peaks[0], logits_CB.amax(1), out=peaks[0])
            for number, listed in enumerate(self._residuals, start=1):
                wide, others_CB = self._head.scratch(logits_CB, 0)
                others_CB.copy_(logits_CB)
                listed.take_out(wide, block, logits=True)
                torch.maximum(peaks[number], others_CB.amax(1), out=peaks[number])
        return torch.cat([peaks, *(listed.peaks().t() for listed in self._grouped)])

    def sums(self, peaks: Tensor) -> Tensor:
        """This rank's part of the sums, given the peaks of all ranks."""
        logits_CV, temperatures, head = self._logits_CV, self._temperatures, self._head
        peak_C, residual_peaks, entry_peaks = self._split_peaks(peaks)
        sums = logits_CV.new_zeros(len(temperatures) + len(self._residuals), logits_CV.shape[0])
        for block in head.blocks:
            logits_CB = logits_CV[:, block]
            for number, temperature in enumerate(temperatures):
                _, exp_CB = head.exponentials(logits_CB, peak_C, temperature, 0)
                sums[number] += exp_CB.sum(1)
            for number, (listed, other_C) in enumerate(zip(self._residuals, residual_peaks, strict=True)):
                wide, exp_CB = head.exponentials(logits_CB, other_C, listed.query.temperature, 0)
                listed.take_out(wide, block, logits=False)
                sums[len(temperatures) + number] += exp_CB.sum(1)
        entries = [
            listed.sums(entry_peak_CK)
            if isinstance(listed, ListedMembers) and entry_peak_CK is not None
            else listed.logits()
            for listed, entry_peak_CK in zip(self._listed, entry_peaks, strict=True)
        ]
        return torch.cat([sums, *(entry_CK.t() for entry_CK in entries)])

    def answers(self, peaks: Tensor, packed: Tensor) -> tuple[list[SparseLogProbs], list[Sums]]:
        """The answers, from peaks and sums of all ranks."""
        peak_C, residual_peaks, entry_peaks = self._split_peaks(peaks)
        temperatures, num_residuals = self._temperatures, len(self._residuals)
        widths = [listed.query.ids_TK.shape[1] for listed in self._listed]
        sums, residual_sums, *entries = packed.split([len(temperatures), num_residuals, *widths])
        residuals = zip(residual_peaks, residual_sums, strict=True)
        results, state = [], []
        for listed, entry_peak_CK, entry_KC in zip(self._listed, entry_peaks, entries, strict=True):
            query = listed.query
            sum_C = sums[temperatures.index(query.temperature)]
            log_sum_C = sum_C.log()
            # Differences of logits before anything else: exact even where the logits themselves are large.
            if entry_peak_CK is None:
                logp_CK = ((entry_KC - peak_C) / query.temperature - log_sum_C).t()
            else:
                gap_KC = (entry_peak_CK.t() - peak_C) / query.temperature
                logp_CK = (gap_KC + entry_KC.log() - log_sum_C).t()
            logp_CK = torch.where(query.ids_TK >= 0, logp_CK, 0.0)
            lse_C = peak_C / query.temperature + log_sum_C
            other_peak_C = other_sum_C = log_residual_C = None
            if query.residual:
                other_peak_C, other_sum_C = next(residuals)
                log_residual_C = (other_peak_C - peak_C) / query.temperature + other_sum_C.log() - log_sum_C
            results.append(SparseLogProbs(logp_CK, lse_C, log_residual_C))
            entry_sum_CK = None if entry_peak_CK is None else entry_KC.t()
            state.append(Sums(peak_C, sum_C, other_peak_C, other_sum_C, entry_peak_CK, entry_sum_CK))
        return results, state

    def _split_peaks(self, peaks: Tensor) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """[C], those of the residuals [n, C], and [C, K] of each query (None: no groups)."""
        widths = [listed.query.ids_TK.shape[1] for listed in self._grouped]
        peak, residuals, *entries = peaks.split([1, len(self._residuals), *widths])
        found = iter(entries)
        return peak[0], residuals, [next(found).t() if listed in self._grouped else None for listed in self._listed]
