"""Log-probabilities of a few ids, or groups of ids, per token from a vocabulary-parallel head; every loss uses them.

Two entry points over one kernel (`_head`). With N tokens and chunks of `chunk_tokens`:

* `fused_token_loss` for losses that are a sum over tokens (SFT, distillation). The loss is evaluated chunk by chunk
  and both gradients are taken at once, while the chunk's logits exist: three products with the weight in all.
* `sparse_log_probs` for losses that couple tokens (preferences). Backward computes each chunk's logits again: four.

Under tensor parallelism the weight is this rank's rows and `hidden` is the same on every rank. Values are reduced over
the group; the returned d_hidden is this rank's *partial* sum, which Megatron's mapping in front of the kernel reduces
(`copy_to_tensor_model_parallel_region`, or `gather_from_sequence_parallel_region` under sequence parallelism). The
upstream gradient is the same on every rank, so no factor of the group's size appears anywhere.

Shape suffixes: T tokens, C tokens of a chunk, H hidden size, V this rank's vocabulary rows, K entries of a query (ids
and groups), M auxiliary sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusemega.logits._gradients import Gradients
from fusemega.logits._head import ChunkedHead
from fusemega.logits._query import Query, SparseLogProbs, Sums
from fusemega.logits.groups import Groups

__all__ = ["Groups", "Query", "SparseLogProbs", "TokenLoss", "fused_token_loss", "sparse_log_probs"]

TokenLoss = Callable[[list[SparseLogProbs], slice], tuple[Tensor, Tensor]]


def sparse_log_probs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    query: Query,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> SparseLogProbs:
    """Log-probabilities at `query.ids_TK`, differentiable in hidden and weight through all three outputs.

    Args:
        hidden_TH: [T, H] final hidden states, bf16, fp32 or float64; T may be 0.
        weight_VH: [V, H] this rank's rows of the output weight, padding rows included, same dtype.
        query: ids, temperature, and whether the residual is wanted.
        group: tensor-parallel group; None: the weight is whole.
        vocab_size: real (unpadded) vocabulary over all ranks.
        softcap: final logit soft-capping, as in Gemma 2.
        chunk_tokens: tokens whose logits exist at once; None chooses.

    Returns:
        fp32 (float64 for float64 inputs) tensors, equal on every rank of the group.

    Raises:
        ValueError: shapes or dtypes that do not fit, ids that are neither -1 nor of the vocabulary nor of a
            group, a group twice in one row.
    """
    options = {"group": group, "vocab_size": vocab_size, "softcap": softcap, "chunk_tokens": chunk_tokens}
    logp_TK, lse_T, log_residual_T = _SparseLogProbs.apply(hidden_TH, weight_VH, query, options)
    return SparseLogProbs(logp_TK, lse_T, log_residual_T)


def fused_token_loss(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    queries: Sequence[Query],
    f: TokenLoss,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over tokens of `f`, with both gradients taken during the forward pass.

    `f(results, rows)` gets one `SparseLogProbs` a query for the tokens `rows` of the call (possibly none) and returns
    the loss of each token [C] and auxiliary figures [C, M] to be summed without gradient. It must treat tokens
    independently, and reach the model only through `results`.

    Gradients are held from forward to backward, and backward, which multiplies them by the scalar upstream gradient,
    can run once. With gradients disabled only values are computed; so inside activation recomputation the results are
    right, but the work is done twice: keep the head out of recomputed regions.

    Args:
        queries: at least one. The softmax is computed once per distinct temperature.
        (others): as in `sparse_log_probs`.

    Returns:
        loss_sum: scalar; aux_sums_M: [M], detached. Equal on every rank of the group.

    Raises:
        ValueError: as `sparse_log_probs`.
        RuntimeError: backward a second time.
    """
    options = {"group": group, "vocab_size": vocab_size, "softcap": softcap, "chunk_tokens": chunk_tokens}
    # Asked here: inside the autograd function's forward, gradients are always disabled.
    taught = torch.is_grad_enabled()
    wanted = (taught and hidden_TH.requires_grad, taught and weight_VH.requires_grad)
    loss, aux_M = _FusedTokenLoss.apply(hidden_TH, weight_VH, tuple(queries), f, wanted, options)
    return loss, aux_M


class _SparseLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, query: Query, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        head = ChunkedHead(hidden_TH, weight_VH, [query], **options)
        results, states = [], []
        for rows in head.chunks:
            result, state = head.reduce(head.logits(rows), [query.rows(rows)])
            results += result
            states += state
        ctx.save_for_backward(
            hidden_TH,
            weight_VH,
            query.ids_TK,
            *Sums.cat(states).tensors(),
        )
        ctx.query, ctx.options = query, options
        return (
            torch.cat([result.logp_TK for result in results]),
            torch.cat([result.lse_T for result in results]),
            _cat([result.log_residual_T for result in results]),
        )

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_logp_TK: Tensor, d_lse_T: Tensor, d_residual_T: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_TH, weight_VH, ids_TK, *sums = ctx.saved_tensors
        query, state = replace(ctx.query, ids_TK=ids_TK), Sums(*sums)
        head = ChunkedHead(hidden_TH, weight_VH, [query], **ctx.options)
        gradients = Gradients(hidden_TH, weight_VH, head.dtype, head.blocks, ctx.needs_input_grad[:2])
        for rows in head.chunks:
            upstream = SparseLogProbs(d_logp_TK[rows], d_lse_T[rows], _rows(d_residual_T, rows))
            head.backward(rows, head.logits(rows), [query.rows(rows)], [state.rows(rows)], [upstream], gradients)
        return (*gradients.give(1.0), None, None)


class _FusedTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        queries: tuple[Query, ...],
        f: TokenLoss,
        wanted: tuple[bool, bool],
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        head = ChunkedHead(hidden_TH, weight_VH, queries, **options)
        gradients = Gradients(hidden_TH, weight_VH, head.dtype, head.blocks, wanted)
        losses, auxes = [], []
        for rows in head.chunks:
            logits_CV = head.logits(rows)
            chunk_queries = [query.rows(rows) for query in queries]
            results, state = head.reduce(logits_CV, chunk_queries)
            loss, aux_M, upstream = _evaluate(f, results, rows, any(wanted))
            losses.append(loss)
            auxes.append(aux_M)
            if upstream is not None:
                head.backward(rows, logits_CV, chunk_queries, state, upstream, gradients)
        ctx.gradients = gradients
        aux_sums_M = torch.stack(auxes).sum(0)
        ctx.mark_non_differentiable(aux_sums_M)
        return torch.stack(losses).sum(), aux_sums_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        return (*ctx.gradients.give(d_loss), None, None, None, None)


def _evaluate(
    f: TokenLoss, results: list[SparseLogProbs], rows: slice, with_gradient: bool
) -> tuple[Tensor, Tensor, list[SparseLogProbs] | None]:
    """Sums of f over the chunk, and its gradient in the form of `results`; None where there is none to pass on."""
    if not with_gradient:
        loss_C, aux_CM = f(results, rows)
        return loss_C.sum(), aux_CM.sum(0), None
    leaves = [_Leaves.of(result) for result in results]
    with torch.enable_grad():
        loss_C, aux_CM = f([leaf.as_result() for leaf in leaves], rows)
        loss = loss_C.sum()
    upstream = None
    if loss.requires_grad:
        # Gradients go to the leaves only, even if f refers to other tensors that require them.
        loss.backward(inputs=[tensor for leaf in leaves for tensor in leaf if tensor is not None])
        upstream = [leaf.gradients() for leaf in leaves]
    return loss.detach(), aux_CM.detach().sum(0), upstream


class _Leaves(NamedTuple):
    """A chunk's results as autograd leaves, with respect to which the gradient of f is taken."""

    logp_CK: Tensor
    lse_C: Tensor
    log_residual_C: Tensor | None

    @classmethod
    def of(cls, result: SparseLogProbs) -> _Leaves:
        residual_C = result.log_residual_T
        return cls(
            result.logp_TK.detach().requires_grad_(),
            result.lse_T.detach().requires_grad_(),
            None if residual_C is None else residual_C.detach().requires_grad_(),
        )

    def as_result(self) -> SparseLogProbs:
        return SparseLogProbs(*self)

    def gradients(self) -> SparseLogProbs:
        """The leaves' gradients in the form of a result; zeros for a leaf that f did not use."""
        residual_C = self.log_residual_C
        return SparseLogProbs(
            _gradient(self.logp_CK), _gradient(self.lse_C), None if residual_C is None else _gradient(residual_C)
        )


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _cat(parts: list[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def _rows(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]
