"""The oracle: log-probabilities by plain loops over a dense head in float64, differentiable through autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusemega.logits.vocab import Groups, Query, SparseLogProbs


def log_sum_exp(values: list[Tensor]) -> Tensor:
    if not values:
        return torch.tensor(-torch.inf, dtype=torch.float64)
    peak = max(value.detach() for value in values)
    total = torch.zeros((), dtype=torch.float64)
    for value in values:
        total = total + torch.exp(value - peak)
    return peak + torch.log(total)


def members_of(entry: int, vocab_size: int, groups: Groups | None) -> list[tuple[int, float]]:
    """The ids that an entry of a query stands for, and their weights."""
    if entry < vocab_size:
        return [(entry, 1.0)]
    assert groups is not None
    start = int(groups.start_J[entry - vocab_size])
    places = range(start, start + int(groups.count_J[entry - vocab_size]))
    return [(int(groups.members_E[e]), 1.0 if groups.weight_E is None else float(groups.weight_E[e])) for e in places]


def loops(hidden_TH: Tensor, weight_VH: Tensor, query: Query, softcap: float | None = None) -> SparseLogProbs:
    """The answer to `query`, token by token and id by id. `weight_VH` holds real rows only."""
    logp, lse, residual = [], [], []
    for t in range(len(hidden_TH)):
        scores = []
        for v in range(len(weight_VH)):
            logit = torch.dot(hidden_TH[t], weight_VH[v])
            if softcap is not None:
                logit = softcap * torch.tanh(logit / softcap)
            scores.append(logit / query.temperature)
        lse.append(log_sum_exp(scores))
        left = [1.0] * len(scores)
        row = []
        for i in query.ids_TK[t].tolist():
            parts = [] if i < 0 else members_of(i, len(scores), query.groups)
            logs = [scores[v] + math.log(w) for v, w in parts]
            row.append(log_sum_exp(logs) - lse[-1] if logs else torch.zeros((), dtype=torch.float64))
            for v, w in parts:
                left[v] -= w
        logp.append(torch.stack(row))
        others = [score + math.log(part) for score, part in zip(scores, left, strict=True) if part > 1e-9]
        residual.append(log_sum_exp(others) - lse[-1])
    return SparseLogProbs(torch.stack(logp), torch.stack(lse), torch.stack(residual) if query.residual else None)


def make_head(tokens: int = 4, hidden: int = 5, rows: int = 150, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random float64 hidden states and weight that want gradients."""
    generator = torch.Generator().manual_seed(seed)
    hidden_TH = torch.randn(tokens, hidden, dtype=torch.float64, generator=generator)
    weight_VH = torch.randn(rows, hidden, dtype=torch.float64, generator=generator)
    return hidden_TH.requires_grad_(), weight_VH.requires_grad_()


def make_ids(tokens: int = 4, listed: int = 6, vocab_size: int = 141, seed: int = 1) -> Tensor:
    """Random ids with a duplicate in the first row and padding in the second."""
    ids_TK = torch.randint(vocab_size, (tokens, listed), generator=torch.Generator().manual_seed(seed))
    ids_TK[0, 1 % listed] = ids_TK[0, 0]
    ids_TK[1, 2:4] = -1
    return ids_TK
