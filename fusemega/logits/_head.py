"""The vocabulary head, one chunk of tokens at a time: logits and both gradients.

`vocab` and `topk` are the public side. Nothing here keeps a [tokens, vocabulary] tensor: logits exist one
chunk of tokens at a time, and every product with the weight goes vocabulary block by vocabulary block.
The few sums that a loss needs are in `_sums`, the gradient in the logits in `_slopes`.

Shape suffixes: T tokens of the call, C tokens of one chunk, H hidden size, V this rank's real (unpadded)
vocabulary rows, B rows of one vocabulary block, P of a panel of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fusemega.logits._gradients import Gradients
from fusemega.logits._listed import Listed
from fusemega.logits._members import ListedMembers
from fusemega.logits._products import add_product, operand_dtype, put_product
from fusemega.logits._query import Query, SparseLogProbs, Sums, check_query
from fusemega.logits._slopes import d_logits
from fusemega.logits._sums import reduce_together

MIB = 1 << 20
# Logits of one chunk. On a CPU small enough to stay a minor part of the memory, on a GPU large enough for full GEMMs.
CHUNK_BYTES = {"cpu": 96 * MIB, "cuda": 512 * MIB}
# Weight rows multiplied at once, in the arithmetic's dtype. Above 32 MiB glibc gives freed blocks straight back.
BLOCK_BYTES = {"cpu": 40 * MIB, "cuda": 256 * MIB}
# Columns of logits that one product fills: on CPUs narrow panels, which stay in cache, run 1.3 times as fast.
PANEL_COLUMNS = {"cpu": 1024, "cuda": 1 << 30}
# Spare columns at the right of a scratch buffer: writes to ids outside the block land there. 16 keeps rows aligned.
SINK = 16


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
        ValueError: shapes or dtypes that do not fit, ids that are neither -1 nor of the vocabulary nor of a group,
            a group twice in one row, non-positive temperature.
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
        self._vocab_size = vocab_size
        self._listed: list[Listed] = []
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
        self._listed = []
        hidden_CH = self.hidden_TH[rows].to(self.gemm_dtype)
        logits_CV = self._logits_CV[: hidden_CH.shape[0]]
        for block in self.blocks:
            logits_CB = logits_CV[:, block]
            panels = zip(self._weight(block).split(self._panel), logits_CB.split(self._panel, dim=1), strict=True)
            for weight_PH, logits_CP in panels:
                put_product(logits_CP, hidden_CH, weight_PH.t())
            if self.softcap is not None:
                logits_CB.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_CV

    def reduce(self, logits_CV: Tensor, queries: Sequence[Query]) -> tuple[list[SparseLogProbs], list[Sums]]:
        """Answers `queries` (already cut to the chunk's rows) with one max- and one sum-all-reduce."""
        return reduce_together([(self, logits_CV, queries)])[0]

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
        for number, (block, d_logits_CB) in enumerate(d_logits(self, logits_CV, queries, state, upstream, further_CV)):
            factor_CB = d_logits_CB.to(self.gemm_dtype)
            if d_hidden_TH is not None:
                add_product(d_hidden_TH[rows], factor_CB, self._weight(block))
            if d_weight is not None:
                add_product(d_weight.blocks[number], factor_CB.t(), hidden_CH)

    def listed(self, logits_CV: Tensor, queries: Sequence[Query]) -> list[Listed]:
        """What each of `queries`, cut to the chunk's rows, lists; kept for the same queries until the next chunk."""
        if [id(listed.query) for listed in self._listed] != [id(query) for query in queries]:
            self._listed = [
                Listed(query, logits_CV, self.first_id)
                if query.groups is None or not query.groups.num_groups or not query.ids_TK.numel()
                else ListedMembers(query, query.groups, logits_CV, self.first_id, self._vocab_size)
                for query in queries
            ]
        return self._listed

    def _weight(self, block: slice) -> Tensor:
        weight_BH = self.weight_VH[block]
        if self._wide_BH is None:
            return weight_BH
        return self._wide_BH[: weight_BH.shape[0]].copy_(weight_BH)

    def scratch(self, logits_CB: Tensor, which: int) -> tuple[Tensor, Tensor]:
        """Scratch [C, B + SINK] and its first B columns."""
        tokens, columns = logits_CB.shape
        wide = self._scratch[which][:tokens, : columns + SINK]
        return wide, wide[:, :columns]

    def exponentials(self, logits_CB: Tensor, peak_C: Tensor, temperature: float, which: int) -> tuple[Tensor, Tensor]:
        wide, exp_CB = self.scratch(logits_CB, which)
        torch.sub(logits_CB, peak_C[:, None], out=exp_CB)
        if temperature != 1.0:
            exp_CB.div_(temperature)
        exp_CB.exp_()
        return wide, exp_CB


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
        check_query(query, hidden_TH.shape[0], vocab_size)
