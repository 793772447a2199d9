"""The k most probable ids of every token, as a teacher's row. Holds no more than one chunk of logits.

Shape suffixes: T tokens, C tokens of a chunk, H hidden size, V this rank's vocabulary rows, K ids kept.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fusemega.logits._head import ChunkedHead
from fusemega.logits._query import Query


@torch.no_grad()
def top_k_log_probs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    k: int,
    labels_T: Tensor,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    vocab_size: int,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k largest log-probs of softmax(logits / temperature), the log of the remaining mass, and the labels' ones.

    Args:
        labels_T: int64, the token that follows; from the same logits, so that the head is multiplied with once.
        (others): as in `fusemega.logits.vocab.sparse_log_probs`.

    Returns:
        ids_TK: int64, by falling probability; equal logits by rising id, whatever the number of ranks.
        logp_TK: fp32 (float64 for float64 inputs).
        log_residual_T: log of the probability outside the row, summed over those ids; -inf when k = vocab_size.
        label_logp_T: log softmax(logits) at the labels, at temperature 1.

    Raises:
        ValueError: k outside [1, vocab_size]; shapes or dtypes that do not fit.
    """
    if not 1 <= k <= vocab_size:
        raise ValueError(f"k {k}: expected 1 to {vocab_size}, the vocabulary's size")
    if temperature <= 0:
        raise ValueError(f"temperature {temperature}: expected a positive number")
    head = ChunkedHead(
        hidden_TH,
        weight_VH,
        [Query(labels_T[:, None])],
        group=group,
        vocab_size=vocab_size,
        softcap=softcap,
        chunk_tokens=chunk_tokens,
    )
    ids, logps, residuals, labels = [], [], [], []
    for rows in head.chunks:
        logits_CV = head.logits(rows)
        query = Query(largest_ids(logits_CV, k, head), temperature, residual=True)
        (result, label), _ = head.reduce(logits_CV, [query, Query(labels_T[rows, None])])
        assert result.log_residual_T is not None
        ids.append(query.ids_TK)
        logps.append(result.logp_TK)
        residuals.append(result.log_residual_T)
        labels.append(label.logp_TK[:, 0])
    return torch.cat(ids), torch.cat(logps), torch.cat(residuals), torch.cat(labels)


@torch.no_grad()
def top_ids(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    k: int,
    excluded: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """int64 [T, k]: the most probable ids that are not excluded, by falling probability; -1 where there are fewer.

    Args:
        k: 1 to vocab_size.
        excluded: bool [vocab_size], on the device of `hidden_TH`.
        (others): as in `fusemega.logits.vocab.sparse_log_probs`.
    """
    none_T0 = torch.empty(len(hidden_TH), 0, dtype=torch.int64, device=hidden_TH.device)
    head = ChunkedHead(
        hidden_TH,
        weight_VH,
        [Query(none_T0)],
        group=group,
        vocab_size=vocab_size,
        softcap=softcap,
        chunk_tokens=chunk_tokens,
    )
    found = []
    for rows in head.chunks:
        logits_CV = head.logits(rows)
        here = excluded[head.first_id : head.first_id + logits_CV.shape[1]]
        ids_CK = largest_ids(logits_CV.masked_fill_(here, -torch.inf), k, head)
        found.append(torch.where((ids_CK < 0) | excluded[ids_CK.clamp(min=0)], -1, ids_CK))
    return torch.cat(found)


def largest_ids(logits_CV: Tensor, k: int, head: ChunkedHead) -> Tensor:
    """Ids [C, K] of the largest logits over all ranks."""
    values_CK, columns_CK = _local_largest(logits_CV, min(k, logits_CV.shape[1]))
    ids_CK = columns_CK + head.first_id
    if head.group is not None:
        missing = (0, k - values_CK.shape[1])  # a rank with fewer than k real rows
        values_CK = torch.nn.functional.pad(values_CK, missing, value=-torch.inf)
        ids_CK = torch.nn.functional.pad(ids_CK, missing, value=-1)
        values_CK, ids_CK = _gather(values_CK, head.group), _gather(ids_CK, head.group)
    # Candidates come by rank, and within a rank by (value, id); a stable sort on the value keeps rising ids.
    order = values_CK.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return ids_CK.gather(1, order)


def _local_largest(logits_CV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Largest logits and their columns, by falling value, then rising column (which torch.topk does not promise)."""
    # One more than is asked for, which says whether equal logits lie across the border.
    values_CK, columns_CK = logits_CV.topk(min(k + 1, logits_CV.shape[1]), dim=1)
    crowded_C = (values_CK[:, k - 1] == values_CK[:, k]) if 0 < k < logits_CV.shape[1] else None
    columns_CK, order = columns_CK[:, :k].sort(dim=1)
    values_CK, order = values_CK.gather(1, order).sort(dim=1, descending=True, stable=True)
    columns_CK = columns_CK.gather(1, order)
    if crowded_C is not None:  # topk may have kept any of the equal ones
        crowded = crowded_C.nonzero()[:, 0]
        exact = logits_CV[crowded].sort(dim=1, descending=True, stable=True)
        columns_CK[crowded] = exact.indices[:, :k]
    return values_CK, columns_CK


def _gather(values_CK: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(values_CK) for _ in range(dist.get_world_size(group))]
    if values_CK.numel():
        dist.all_gather(parts, values_CK.contiguous(), group=group)
    return torch.cat(parts, dim=1)
