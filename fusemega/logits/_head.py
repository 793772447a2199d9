"""The vocabulary head, one chunk of tokens at a time: logits, the few sums a loss needs, and their gradient.

`vocab` and `topk` are the public side. Nothing here keeps a [tokens, vocabulary] tensor: logits exist one
chunk of tokens at a time, and every product with the weight goes vocabulary block by vocabulary block.

Shape suffixes: T tokens of the call, C tokens of one chunk, H hidden size, V this rank's real (unpadded)
vocabulary rows, B rows of one vocabulary block, P of a panel of it, K listed ids of a query.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fusemega.logits._gradients import Gradients
from fusemega.logits._products import add_product, operand_dtype, product

MIB = 1 << 20
# Logits of one chunk. On a CPU small enough to stay a minor part of the memory, on a GPU large enough for full GEMMs.
CHUNK_BYTES = {"cpu": 96 * MIB, "cuda": 512 * MIB}
# Weight rows multiplied at once, in the arithmetic's dtype. Above 32 MiB glibc gives freed blocks straight back.
BLOCK_BYTES = {"cpu": 40 * MIB, "cuda": 256 * MIB}
# Columns of logits that one product fills: on CPUs narrow panels, which stay in cache, run 1.3 times as fast.
PANEL_COLUMNS = {"cpu": 1024, "cuda": 1 << 30}
# Spare columns at the right of a scratch buffer: writes to ids outside the block land there. 16 keeps rows aligned.
SINK = 16


@dataclass(frozen=True, eq=False)
class Query:
    """What one term of a loss wants to know about each token's distribution softmax(logits / temperature).

    Attributes:
        ids_TK: int64 vocabulary ids (global, not this rank's). -1 is padding: its log-probability reads 0.0 and
            passes no gradient back. The same id may appear twice in a row; gradients add.
        temperature: > 0, divides the (soft-capped) logits.
        residual: also give the log-probability of all ids that are *not* in the row.
    """

    ids_TK: Tensor
    temperature: float = 1.0
    residual: bool = False

    def rows(self, rows: slice) -> Query:
        return Query(self.ids_TK[rows], self.temperature, self.residual)


@dataclass(frozen=True, eq=False)
class SparseLogProbs:
    """The answer to a `Query`, in fp32 (float64 for float64 inputs), the same on every rank of the group.

    Attributes:
        logp_TK: log-probabilities of the listed ids; 0.0 at padding.
        lse_T: logsumexp(logits / temperature) over the vocabulary.
        log_residual_T: log of the total probability of the ids not listed, summed over those ids themselves (never
            1 - sum, so 1e-12 is exact); -inf where every id is listed. None unless asked for.
    """

    logp_TK: Tensor
    lse_T: Tensor
    log_residual_T: Tensor | None


@dataclass(frozen=True, eq=False)
class Sums:
    """sum_v exp((logit_v - peak) / temperature) over the vocabulary, and over the ids not listed."""

    peak_C: Tensor
    sum_C: Tensor
    residual_peak_C: Tensor | None
    residual_sum_C: Tensor | None


class ChunkedHead:
    """One call's view of this rank's slice of the output weight, with the buffers that its chunks share.

    Args:
        hidden_TH: final hidden states, same on every rank of the group.
        weight_VH: this rank's rows, padding rows included; global id = rank * rows + row.
        queries: at least one; T rows each.
        group: tensor-parallel group; None or one rank: no collective.
        vocab_size: real vocabulary over all ranks. Rows past it never enter the softmax.
        softcap: logits become softcap * tanh(logits / softcap).
        chunk_tokens: tokens a chunk; None chooses by `CHUNK_BYTES`.

    Raises:
        ValueError: shapes or dtypes that do not fit, ids outside [-1, vocab_size), non-positive temperature.
    """

    def __init__(
        self,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        queries: Sequence[Query],
        *,
        group: dist.ProcessGroup | None,
        vocab_size: int,
        softcap: float | None,
        chunk_tokens: int | None,
    ) -> None:
        ranks = dist.get_world_size(group) if group is not None else 1
        self.group = group if ranks > 1 else None
        self.first_id = dist.get_rank(group) * weight_VH.shape[0] if group is not None else 0
        _check(hidden_TH, weight_VH, queries, ranks, vocab_size, softcap, chunk_tokens)
        real = min(max(vocab_size - self.first_id, 0), weight_VH.shape[0])
        self.hidden_TH = hidden_TH.detach()
        self.weight_VH = weight_VH.detach()[:real]
        self.softcap = softcap
        self.dtype = torch.promote_types(hidden_TH.dtype, torch.float32)
        device = hidden_TH.device
        self.gemm_dtype = operand_dtype(hidden_TH.dtype, device)

        tokens, hidden_size = hidden_TH.shape
        chunk_tokens = min(chunk_tokens or default_chunk(weight_VH, self.dtype), max(tokens, 1))
        self._panel = _for_device(PANEL_COLUMNS, device)
        rows = max(64, _for_device(BLOCK_BYTES, device) // (hidden_size * self.dtype.itemsize) // 64 * 64)
        # One chunk even of no tokens, because callers concatenate the chunks' results.
        self.chunks = [slice(at, min(at + chunk_tokens, tokens)) for at in range(0, max(tokens, 1), chunk_tokens)]
        self.blocks = [slice(at, min(at + rows, real)) for at in range(0, real, rows)]
        # The same rows in pieces whose logits stay in a CPU's cache, for arithmetic on each of them.
        width = min(self._panel, rows)
        self.panels = [slice(at, min(at + width, real)) for at in range(0, real, width)]
        block_rows = min(rows, real)
        self._logits_CV = torch.empty(chunk_tokens, real, dtype=self.dtype, device=device)
        # One for a running total, one for the exponentials that are added to it.
        self._scratch = [
            torch.empty(chunk_tokens, block_rows + SINK, dtype=self.dtype, device=device) for _ in range(2)
        ]
        widen = self.gemm_dtype != weight_VH.dtype
        self._wide_BH = torch.empty(block_rows, hidden_size, dtype=self.gemm_dtype, device=device) if widen else None

    def logits(self, rows: slice) -> Tensor:
        """Soft-capped logits [C, V] of the tokens `rows`, in a buffer that the next call overwrites."""
        hidden_CH = self.hidden_TH[rows].to(self.gemm_dtype)
        logits_CV = self._logits_CV[: hidden_CH.shape[0]]
        for block in self.blocks:
            logits_CB = logits_CV[:, block]
            if self.gemm_dtype == self.dtype:
                panels = zip(self._weight(block).split(self._panel), logits_CB.split(self._panel, dim=1), strict=True)
                for weight_PH, logits_CP in panels:
                    torch.mm(hidden_CH, weight_PH.t(), out=logits_CP)
            else:
                logits_CB.copy_(product(hidden_CH, self._weight(block).t()))
            if self.softcap is not None:
                logits_CB.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_CV

    def reduce(self, logits_CV: Tensor, queries: Sequence[Query]) -> tuple[list[SparseLogProbs], list[Sums]]:
        """Answers `queries` (already cut to the chunk's rows) with one max- and one sum-all-reduce."""
        return reduce_together([(self, logits_CV, queries)])[0]

    def _peaks(self, logits_CV: Tensor, queries: Sequence[Query]) -> Tensor:
        """Largest logit on this rank, then the largest one that is not listed for each query with a residual."""
        residuals = [query for query in queries if query.residual]
        peaks = logits_CV.new_full((1 + len(residuals), logits_CV.shape[0]), -torch.inf)
        for block in self.blocks:
            logits_CB = logits_CV[:, block]
            torch.maximum(peaks[0], logits_CB.amax(1), out=peaks[0])
            for number, query in enumerate(residuals, start=1):
                wide, others_CB = self._scratch_for(logits_CB, 0)
                others_CB.copy_(logits_CB)
                wide.scatter_(1, self._columns(query.ids_TK, block), -torch.inf)
                torch.maximum(peaks[number], others_CB.amax(1), out=peaks[number])
        return peaks

    def _sums(self, logits_CV: Tensor, queries: Sequence[Query], peaks: Tensor) -> Tensor:
        """This rank's part of the sum for each temperature and each residual, then of each query's listed logits."""
        temperatures = sorted({query.temperature for query in queries})
        residuals = [query for query in queries if query.residual]
        sums = logits_CV.new_zeros(len(temperatures) + len(residuals), logits_CV.shape[0])
        for block in self.blocks:
            logits_CB = logits_CV[:, block]
            for number, temperature in enumerate(temperatures):
                _, exp_CB = self._exponentials(logits_CB, peaks[0], temperature, 0)
                sums[number] += exp_CB.sum(1)
            for number, query in enumerate(residuals):
                wide, exp_CB = self._exponentials(logits_CB, peaks[1 + number], query.temperature, 0)
                wide.scatter_(1, self._columns(query.ids_TK, block), 0.0)
                sums[len(temperatures) + number] += exp_CB.sum(1)
        listed = [self._listed_logits(logits_CV, query.ids_TK) for query in queries]
        return torch.cat([sums, *(logits_CK.t() for logits_CK in listed)])

    def _answers(
        self, queries: Sequence[Query], peaks: Tensor, packed: Tensor
    ) -> tuple[list[SparseLogProbs], list[Sums]]:
        """The answers, from the results of `_peaks` and `_sums` after their reduction over the ranks."""
        temperatures = sorted({query.temperature for query in queries})
        num_sums = len(temperatures) + sum(query.residual for query in queries)
        sums, *listed = packed.split([num_sums, *(query.ids_TK.shape[1] for query in queries)])
        results, state = [], []
        residual_number = 0
        for query, logits_KC in zip(queries, listed, strict=True):
            peak_C, sum_C = peaks[0], sums[temperatures.index(query.temperature)]
            log_sum_C = sum_C.log()
            # Differences of logits before anything else: exact even where the logits themselves are large.
            logp_CK = ((logits_KC - peak_C) / query.temperature - log_sum_C).t()
            logp_CK = torch.where(query.ids_TK >= 0, logp_CK, 0.0)
            lse_C = peak_C / query.temperature + log_sum_C
            other_peak_C = other_sum_C = log_residual_C = None
            if query.residual:
                other_peak_C = peaks[1 + residual_number]
                other_sum_C = sums[len(temperatures) + residual_number]
                log_residual_C = (other_peak_C - peak_C) / query.temperature + other_sum_C.log() - log_sum_C
                residual_number += 1
            results.append(SparseLogProbs(logp_CK, lse_C, log_residual_C))
            state.append(Sums(peak_C, sum_C, other_peak_C, other_sum_C))
        return results, state

    def backward(
        self,
        rows: slice,
        logits_CV: Tensor,
        queries: Sequence[Query],
        state: Sequence[Sums],
        upstream: Sequence[SparseLogProbs],
        gradients: Gradients,
        further_CV: Tensor | None = None,
    ) -> None:
        """Adds this chunk's part of both gradients, given those of its `SparseLogProbs`; no collective.

        d_hidden is this rank's partial sum over its vocabulary rows. `further_CV` is a further gradient of the
        loss in the (soft-capped) logits.
        """
        hidden_CH = self.hidden_TH[rows].to(self.gemm_dtype)
        d_hidden_TH, d_weight = gradients.d_hidden_TH, gradients.d_weight
        for number, (block, d_logits_CB) in enumerate(self._d_logits(logits_CV, queries, state, upstream, further_CV)):
            factor_CB = d_logits_CB.to(self.gemm_dtype)
            if d_hidden_TH is not None:
                add_product(d_hidden_TH[rows], factor_CB, self._weight(block))
            if d_weight is not None:
                add_product(d_weight.blocks[number], factor_CB.t(), hidden_CH)

    def _d_logits(
        self,
        logits_CV: Tensor,
        queries: Sequence[Query],
        state: Sequence[Sums],
        upstream: Sequence[SparseLogProbs],
        further_CV: Tensor | None,
    ) -> Iterator[tuple[slice, Tensor]]:
        """Block by block, d loss / d raw logits.

        With s = logit / T, p = softmax(s), r = softmax(s) over the ids not listed, upstream gradients g_k, dlse, dr:
            ds_v = (dlse - sum_k g_k - dr) p_v + sum_{k: id_k = v} g_k + dr r_v [v not listed].
        """
        base: dict[float, tuple[Tensor, Tensor]] = {}  # temperature -> peak and the factor of exp((logit - peak) / T)
        residuals: list[tuple[Query, Tensor, Tensor]] = []
        for query, sums, grad in zip(queries, state, upstream, strict=True):
            listed_CK = torch.where(query.ids_TK >= 0, grad.logp_TK, 0.0)
            share_C = grad.lse_T - listed_CK.sum(1)
            if query.residual:
                assert grad.log_residual_T is not None and sums.residual_sum_C is not None
                assert sums.residual_peak_C is not None
                some = sums.residual_sum_C > 0
                d_residual_C = torch.where(some, grad.log_residual_T, 0.0)
                share_C = share_C - d_residual_C
                factor_C = d_residual_C / torch.where(some, sums.residual_sum_C, 1.0) / query.temperature
                residuals.append((query, sums.residual_peak_C, factor_C))
            factor_C = share_C / sums.sum_C / query.temperature
            if query.temperature in base:
                factor_C = factor_C + base[query.temperature][1]
            base[query.temperature] = (sums.peak_C, factor_C)

        for block in self.blocks:
            logits_CB = logits_CV[:, block]
            wide, total_CB = self._scratch_for(logits_CB, 0)
            total_CB.zero_()
            for temperature, (peak_C, factor_C) in base.items():
                _, exp_CB = self._exponentials(logits_CB, peak_C, temperature, 1)
                total_CB.addcmul_(exp_CB, factor_C[:, None])
            for query, peak_C, factor_C in residuals:
                other_wide, exp_CB = self._exponentials(logits_CB, peak_C, query.temperature, 1)
                # A listed id may lie far above the residual's peak: exp is then inf, and is overwritten.
                other_wide.scatter_(1, self._columns(query.ids_TK, block), 0.0)
                total_CB.addcmul_(exp_CB, factor_C[:, None])
            for query, grad in zip(queries, upstream, strict=True):
                wide.scatter_add_(1, self._columns(query.ids_TK, block), grad.logp_TK / query.temperature)
            if further_CV is not None:
                total_CB.add_(further_CV[:, block])
            if self.softcap is not None:  # d cap tanh(x / cap) = 1 - tanh^2
                _, slope_CB = self._scratch_for(logits_CB, 1)
                torch.div(logits_CB, self.softcap, out=slope_CB).square_().neg_().add_(1.0)
                total_CB.mul_(slope_CB)
            yield block, total_CB

    def _weight(self, block: slice) -> Tensor:
        weight_BH = self.weight_VH[block]
        if self._wide_BH is None:
            return weight_BH
        return self._wide_BH[: weight_BH.shape[0]].copy_(weight_BH)

    def _scratch_for(self, logits_CB: Tensor, which: int) -> tuple[Tensor, Tensor]:
        """Scratch [C, B + SINK] and its first B columns."""
        tokens, columns = logits_CB.shape
        wide = self._scratch[which][:tokens, : columns + SINK]
        return wide, wide[:, :columns]

    def _exponentials(self, logits_CB: Tensor, peak_C: Tensor, temperature: float, which: int) -> tuple[Tensor, Tensor]:
        wide, exp_CB = self._scratch_for(logits_CB, which)
        torch.sub(logits_CB, peak_C[:, None], out=exp_CB)
        if temperature != 1.0:
            exp_CB.div_(temperature)
        exp_CB.exp_()
        return wide, exp_CB

    def _columns(self, ids_CK: Tensor, block: slice) -> Tensor:
        """Column of each id in the block's scratch; ids that live elsewhere, and padding, point at the sink."""
        column_CK = ids_CK - (self.first_id + block.start)
        inside = (column_CK >= 0) & (column_CK < block.stop - block.start)
        return torch.where(inside, column_CK, block.stop - block.start)

    def _listed_logits(self, logits_CV: Tensor, ids_CK: Tensor) -> Tensor:
        """Logits of the listed ids on this rank, 0 for the others; the sum over ranks has the logits of all."""
        here = logits_CV.shape[1]
        if here == 0:
            return logits_CV.new_zeros(ids_CK.shape)
        column_CK = ids_CK - self.first_id
        inside = (column_CK >= 0) & (column_CK < here)
        return torch.where(inside, logits_CV.gather(1, column_CK.clamp(0, here - 1)), 0.0)


def reduce_together(
    heads: Sequence[tuple[ChunkedHead, Tensor, Sequence[Query]]],
) -> list[tuple[list[SparseLogProbs], list[Sums]]]:
    """`ChunkedHead.reduce` of several heads' logits of the same tokens, with one max- and one sum-all-reduce in all."""
    group = heads[0][0].group
    peaks = all_reduced(
        [head._peaks(logits_CV, queries) for head, logits_CV, queries in heads], dist.ReduceOp.MAX, group
    )
    parts = [
        head._sums(logits_CV, queries, peak) for (head, logits_CV, queries), peak in zip(heads, peaks, strict=True)
    ]
    sums = all_reduced(parts, dist.ReduceOp.SUM, group)
    return [head._answers(queries, *found) for (head, _, queries), *found in zip(heads, peaks, sums, strict=True)]


def all_reduced(parts: Sequence[Tensor], op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> list[Tensor]:
    """This rank's tensors [n, C], reduced over the group (None: left alone) by one all-reduce."""
    packed = torch.cat(list(parts))
    if group is not None and packed.numel():
        dist.all_reduce(packed, op=op, group=group)
    return list(packed.split([len(part) for part in parts]))


def default_chunk(weight_VH: Tensor, dtype: torch.dtype, heads: int = 1) -> int:
    """How many tokens' logits, of `heads` heads in `dtype`, fill `CHUNK_BYTES`.

    Computed from the padded number of rows, because every rank must cut the same chunks.
    """
    row_bytes = weight_VH.shape[0] * dtype.itemsize * heads
    tokens = max(1, _for_device(CHUNK_BYTES, weight_VH.device) // row_bytes)
    return tokens // 64 * 64 if tokens >= 64 else tokens


def _for_device(table: dict[str, int], device: torch.device) -> int:
    return table.get(device.type, table["cuda"])


def _check(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    queries: Sequence[Query],
    ranks: int,
    vocab_size: int,
    softcap: float | None,
    chunk_tokens: int | None,
) -> None:
    if hidden_TH.dim() != 2 or weight_VH.dim() != 2 or hidden_TH.shape[1] != weight_VH.shape[1]:
        raise ValueError(f"hidden {list(hidden_TH.shape)} and weight {list(weight_VH.shape)}: expected [T, H], [V, H]")
    if hidden_TH.dtype != weight_VH.dtype or not hidden_TH.is_floating_point():
        raise ValueError(f"hidden is {hidden_TH.dtype}, weight {weight_VH.dtype}: expected one floating dtype for both")
    if not 0 < vocab_size <= weight_VH.shape[0] * ranks:
        raise ValueError(f"vocab_size {vocab_size}: expected 1 to {weight_VH.shape[0] * ranks}, the rows of all ranks")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap {softcap}: expected a positive number")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens {chunk_tokens}: expected a positive number")
    for query in queries:
        ids = query.ids_TK
        if ids.dim() != 2 or ids.shape[0] != hidden_TH.shape[0] or ids.dtype != torch.int64:
            raise ValueError(f"ids {list(ids.shape)} of {ids.dtype}: expected int64 [{hidden_TH.shape[0]}, K]")
        if query.temperature <= 0:
            raise ValueError(f"temperature {query.temperature}: expected a positive number")
        if not ids.is_cpu:  # reading them would wait for the device, so the device checks them
            message = f"ids of a query outside -1 (padding) to {vocab_size - 1}"
            torch._assert_async(((ids >= -1) & (ids < vocab_size)).all(), message)
        elif ids.numel() and (ids.max() >= vocab_size or ids.min() < -1):
            raise ValueError(f"ids from {ids.min()} to {ids.max()}: expected -1 (padding) to {vocab_size - 1}")
