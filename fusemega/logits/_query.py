"""What a loss asks the vocabulary head about each token, and the answer.

Shape suffixes: T tokens of the call, C tokens of one chunk, K entries (ids and groups) of a query.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fusemega.logits.groups import Groups

# What is left of an id's weight of 1 counts as 0 below this: weights that sum to 1 do so up to rounding.
LEAST_LEFT = 1e-6


@dataclass(frozen=True, eq=False)
class Query:
    """What one term of a loss wants to know about each token's distribution softmax(logits / temperature).

    Attributes:
        ids_TK: int64 vocabulary ids (global, not this rank's). -1 is padding: its log-probability reads 0.0 and
            passes no gradient back. The same id may appear twice in a row; gradients add. `vocab_size + j` stands
            for group j of `groups`; a row has each group at most once.
        temperature: > 0, divides the (soft-capped) logits.
        residual: also give the log-probability of all ids that are *not* in the row, listed or in a listed group.
            With weights, an id counts with what is left of 1 after its weights in the listed groups are taken off,
            which is at least 0 (and 0 where less than `LEAST_LEFT` is left, because weights sum to 1 up to rounding).
        groups: what ids past the vocabulary mean, on the device of the ids; None: there are no such ids.
    """

    ids_TK: Tensor
    temperature: float = 1.0
    residual: bool = False
    groups: Groups | None = None

    def rows(self, rows: slice) -> Query:
        return replace(self, ids_TK=self.ids_TK[rows])


@dataclass(frozen=True, eq=False)
class SparseLogProbs:
    """The answer to a `Query`, in fp32 (float64 for float64 inputs), the same on every rank of the group.

    Attributes:
        logp_TK: log-probabilities of the listed ids and groups; 0.0 at padding.
        lse_T: logsumexp(logits / temperature) over the vocabulary.
        log_residual_T: log of the total probability of the ids not listed, summed over those ids themselves (never
            1 - sum, so 1e-12 is exact); -inf where every id is listed. None unless asked for.
    """

    logp_TK: Tensor
    lse_T: Tensor
    log_residual_T: Tensor | None


@dataclass(frozen=True, eq=False)
class Sums:
    """sum_v exp((logit_v - peak) / temperature) over the vocabulary, the ids not listed, and each entry's ids."""

    peak_C: Tensor
    sum_C: Tensor
    residual_peak_C: Tensor | None
    residual_sum_C: Tensor | None
    entry_peak_CK: Tensor | None  # the last two are None unless the query has groups
    entry_sum_CK: Tensor | None

    def tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    def rows(self, rows: slice) -> Sums:
        parts: Iterable[Any] = (None if tensor is None else tensor[rows] for tensor in self.tensors())
        return Sums(*parts)

    @staticmethod
    def cat(chunks: Sequence[Sums]) -> Sums:
        """Those of all chunks of one query, one after another."""
        columns: Iterable[tuple[Any, ...]] = zip(*(sums.tensors() for sums in chunks), strict=True)
        whole: Iterable[Any] = (None if parts[0] is None else torch.cat(parts) for parts in columns)
        return Sums(*whole)


def check_query(query: Query, tokens: int, vocab_size: int) -> None:
    """Raises ValueError: the query does not fit a head of `vocab_size` ids and hidden states of `tokens` tokens."""
    ids_TK, groups = query.ids_TK, query.groups
    if ids_TK.dim() != 2 or ids_TK.shape[0] != tokens or ids_TK.dtype != torch.int64:
        raise ValueError(f"ids {list(ids_TK.shape)} of {ids_TK.dtype}: expected int64 [{tokens}, K]")
    if query.temperature <= 0:
        raise ValueError(f"temperature {query.temperature}: expected a positive number")
    limit = vocab_size
    if groups is not None:
        limit += groups.num_groups
        if groups.members_E.device != ids_TK.device:
            raise ValueError(f"groups on {groups.members_E.device} and ids on {ids_TK.device}: expected one device")
        if groups.largest_id >= vocab_size:
            raise ValueError(f"a group has the id {groups.largest_id}: expected ids up to {vocab_size - 1}")
    if not ids_TK.is_cpu:  # reading them would wait for the device, so the device checks them
        message = f"ids of a query outside -1 (padding) to {limit - 1}"
        torch._assert_async(((ids_TK >= -1) & (ids_TK < limit)).all(), message)
    elif ids_TK.numel() and (ids_TK.max() >= limit or ids_TK.min() < -1):
        raise ValueError(f"ids from {ids_TK.min()} to {ids_TK.max()}: expected -1 (padding) to {limit - 1}")
    if groups is not None:
        sorted_TK = ids_TK.sort(dim=1).values
        once = ((sorted_TK[:, 1:] != sorted_TK[:, :-1]) | (sorted_TK[:, 1:] < vocab_size)).all()
        message = "a group twice in one row of a query"
        if not ids_TK.is_cpu:
            torch._assert_async(once, message)
        elif not once:
            raise ValueError(message)
