"""Exact divergences over the whole vocabulary between a model and a teacher that runs in the same job.

With p = softmax(teacher's logits / T) and q = softmax(student's logits / T):

    forward_kl   KL(p || q)                                  covers everything that the teacher finds likely
    reverse_kl   KL(q || p)                                  stays within what the teacher finds likely
    jsd          KL(p || m) / 2 + KL(q || m) / 2, m = (p + q) / 2    (Agarwal et al., arXiv:2306.13649, at beta 1/2)

Each is a sum over the vocabulary of d_v(p_v, q_v). With e_v = q_v dd_v/dq_v, up to a multiple of q_v, its gradient in
the student's scaled logits s = logits / T is

    dD/ds_v = e_v - q_v sum_u e_u

so the vocabulary-parallel part of all three is the same pair of sums, and the second term of the gradient is that of a
log-sum-exp, which `_head` already computes. The same logits give the cross-entropy on labels. In all there are four
products: one with each model's weight, and two for the gradients. Both models' logits exist for one chunk of tokens at
a time; a chunk needs three all-reduces of a few numbers for each token.

Shape suffixes: T tokens, C tokens of a chunk, H hidden size, G the teacher's, V this rank's vocabulary rows, P rows of
a panel of it, K listed ids of a query, M sums over the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusemega.logits._gradients import Gradients
from fusemega.logits._head import ChunkedHead, default_chunk
from fusemega.logits._query import Query, SparseLogProbs, Sums
from fusemega.logits._sums import all_reduced, reduce_together
from fusemega.logits.topk import largest_ids


def _forward_kl(logp_CP: Tensor, logq_CP: Tensor) -> tuple[Tensor, Tensor]:
    p_CP = logp_CP.exp()
    return p_CP * (logp_CP - logq_CP), logq_CP.exp() - p_CP


def _reverse_kl(logp_CP: Tensor, logq_CP: Tensor) -> tuple[Tensor, Tensor]:
    terms_CP = logq_CP.exp() * (logq_CP - logp_CP)
    return terms_CP, terms_CP


def _jsd(logp_CP: Tensor, logq_CP: Tensor) -> tuple[Tensor, Tensor]:
    logm_CP = torch.logaddexp(logp_CP, logq_CP) - math.log(2)
    at_q_CP = 0.5 * logq_CP.exp() * (logq_CP - logm_CP)
    return 0.5 * logp_CP.exp() * (logp_CP - logm_CP) + at_q_CP, at_q_CP


# (log p, log q) of some ids -> d and e of each
DIVERGENCES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
}


def fused_divergence_loss(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    teacher_hidden_TG: Tensor,
    teacher_weight_VG: Tensor,
    labels_T: Tensor,
    divergence: str,
    *,
    temperature: float = 1.0,
    label_weight: Tensor | float,
    divergence_weight: Tensor | float,
    group: dist.ProcessGroup | None = None,
    vocab_size: int,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """sum_t label_weight CE(y_t, q_t) + divergence_weight D(p_t, q_t), both of the student's gradients taken at once.

    The cross-entropy is at temperature 1, the divergence at `temperature` and not multiplied by its square. Nothing
    passes back to the teacher. Gradients are held, given once, and partial over the group, as by `fused_token_loss`.

    Args:
        hidden_TH: [T, H] the student's final hidden states, bf16, fp32 or float64; T may be 0.
        weight_VH: [V, H] this rank's rows of its output weight, padding rows included, same dtype.
        teacher_hidden_TG: [T, G] the teacher's, of the same tokens; G and the dtype are its own.
        teacher_weight_VG: [V, G] the teacher's rows of the same ids.
        labels_T: int64, the token that follows.
        divergence: a name in `DIVERGENCES`.
        temperature: > 0, divides both models' (soft-capped) logits.
        group: tensor-parallel group; None: the weights are whole.
        vocab_size: real (unpadded) vocabulary over all ranks. Rows past it count in neither distribution.
        softcap, teacher_softcap: final logit soft-capping of either.
        chunk_tokens: tokens whose logits exist at once; None chooses.

    Returns:
        loss: scalar; sums_M: [2], those of CE and D over the tokens, detached. fp32 (float64 for float64 students),
        equal on every rank of the group.

    Raises:
        ValueError: shapes or dtypes that do not fit, labels outside the vocabulary, non-positive temperature.
        KeyError: an unknown divergence.
        RuntimeError: backward a second time.
    """
    f = DIVERGENCES[divergence]
    if len(teacher_hidden_TG) != len(hidden_TH) or len(teacher_weight_VG) != len(weight_VH):
        raise ValueError(
            f"teacher's hidden {list(teacher_hidden_TG.shape)} and weight {list(teacher_weight_VG.shape)}: expected "
            f"{len(hidden_TH)} tokens and {len(weight_VH)} vocabulary rows, the student's"
        )
    # Both models get the same number, so that they cut the same chunks.
    if chunk_tokens is None:
        chunk_tokens = default_chunk(weight_VH, torch.promote_types(hidden_TH.dtype, torch.float32), heads=2)
    common: dict[str, Any] = {"group": group, "vocab_size": vocab_size, "chunk_tokens": chunk_tokens}
    # The second query lists no ids: only its log-sum-exp at `temperature` is wanted.
    queries = [Query(labels_T[:, None]), Query(labels_T.new_empty(len(labels_T), 0), temperature)]
    student = ChunkedHead(hidden_TH, weight_VH, queries, softcap=softcap, **common)
    teacher = ChunkedHead(teacher_hidden_TG, teacher_weight_VG, queries[1:], softcap=teacher_softcap, **common)
    # Asked here: inside the autograd function's forward, gradients are always disabled.
    taught = torch.is_grad_enabled()
    wanted = (taught and hidden_TH.requires_grad, taught and weight_VH.requires_grad)
    loss, sums_M = _FusedDivergenceLoss.apply(
        hidden_TH, weight_VH, student, teacher, queries, f, (label_weight, divergence_weight), wanted
    )
    return loss, sums_M


@torch.no_grad()
def compared_sums(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    teacher_hidden_TG: Tensor,
    teacher_weight_VG: Tensor,
    labels_T: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> Tensor:
    """fp64 [3]: sums over the tokens of log q_t(y_t), of KL(p_t || q_t), and of where both have the same likeliest id.

    Among equally likely ids the lowest counts. Arguments are those of `fused_divergence_loss`; equal on every
    rank of the group.
    """
    chunk = default_chunk(weight_VH, torch.promote_types(hidden_TH.dtype, torch.float32), heads=2)
    common: dict[str, Any] = {"group": group, "vocab_size": vocab_size, "chunk_tokens": chunk}
    labels, nothing = Query(labels_T[:, None]), Query(labels_T.new_empty(len(labels_T), 0))
    student = ChunkedHead(hidden_TH, weight_VH, [labels], softcap=softcap, **common)
    teacher = ChunkedHead(teacher_hidden_TG, teacher_weight_VG, [nothing], softcap=teacher_softcap, **common)
    total = torch.zeros(3, dtype=torch.float64, device=hidden_TH.device)
    for rows in student.chunks:
        logits_CV, teacher_CV = student.logits(rows), teacher.logits(rows)
        same_C1 = largest_ids(logits_CV, 1, student) == largest_ids(teacher_CV, 1, teacher)
        ((label,), (sums,)), (_, (teacher_sums,)) = reduce_together(
            [(student, logits_CV, [labels.rows(rows)]), (teacher, teacher_CV, [nothing.rows(rows)])]
        )
        kl = logits_CV.new_zeros(logits_CV.shape[0])
        for panel in student.panels:
            logp_CP = _log_probs(teacher_CV[:, panel], teacher_sums, 1.0)
            kl += _forward_kl(logp_CP, _log_probs(logits_CV[:, panel], sums, 1.0))[0].sum(1)
        kl_C = all_reduced([kl[None]], dist.ReduceOp.SUM, group)[0][0]
        total += torch.stack([label.logp_TK.double().sum(), kl_C.double().sum(), same_C1.double().sum()])
    return total


class _FusedDivergenceLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        student: ChunkedHead,
        teacher: ChunkedHead,
        queries: list[Query],
        f: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        weights: tuple[Tensor | float, Tensor | float],
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        temperature = queries[1].temperature
        gradients = Gradients(hidden_TH, weight_VH, student.dtype, student.blocks, wanted)
        label_weight, divergence_weight = weights
        losses, sums = [], []
        for rows in student.chunks:
            logits_CV, teacher_CV = student.logits(rows), teacher.logits(rows)
            asked = [query.rows(rows) for query in queries]
            (results, state), (_, (teacher_sums,)) = reduce_together(
                [(student, logits_CV, asked), (teacher, teacher_CV, asked[1:])]
            )
            local = logits_CV.new_zeros(2, logits_CV.shape[0])
            for panel in student.panels:
                logp_CP = _log_probs(teacher_CV[:, panel], teacher_sums, temperature)
                logq_CP = _log_probs(logits_CV[:, panel], state[1], temperature)
                d_CP, e_CP = f(logp_CP, logq_CP)
                local[0] += d_CP.sum(1)
                local[1] += e_CP.sum(1)
                teacher_CV[:, panel] = e_CP  # the teacher's logits are not needed any more
            divergence_C, slope_C = all_reduced([local], dist.ReduceOp.SUM, student.group)[0]
            ce_C = -results[0].logp_TK[:, 0]
            losses.append((label_weight * ce_C + divergence_weight * divergence_C).sum())
            sums.append(torch.stack([ce_C.sum(), divergence_C.sum()]))
            if any(wanted):
                # Of dD/ds, the log-sum-exp passes back - q_v sum_u e_u; e_v is added as `further_CV`.
                upstream = [
                    SparseLogProbs(-label_weight * torch.ones_like(ce_C)[:, None], torch.zeros_like(ce_C), None),
                    SparseLogProbs(results[1].logp_TK, -divergence_weight * slope_C, None),
                ]
                # 1 / temperature, because e_v is a gradient in s = logits / T.
                further_CV = teacher_CV.mul_(divergence_weight / temperature)
                student.backward(rows, logits_CV, asked, state, upstream, gradients, further_CV)
        ctx.gradients = gradients
        sums_M = torch.stack(sums).sum(0)
        ctx.mark_non_differentiable(sums_M)
        return torch.stack(losses).sum(), sums_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.gradients.give(d_loss), *(None for _ in range(6)))


def _log_probs(logits_CP: Tensor, sums: Sums, temperature: float) -> Tensor:
    return (logits_CP - sums.peak_C[:, None]).div_(temperature).sub_(sums.sum_C.log()[:, None])
