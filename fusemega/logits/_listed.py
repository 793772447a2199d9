"""The ids that a chunk's query lists, with groups written out as their members.

A row of K entries (ids and groups) becomes a row of L ids, L being the most that any row needs: on a CPU in this chunk,
and on a GPU, where reading it would wait for the device, with any K groups. Most groups are small, so L is far below
the size of the vocabulary, and the cost does not depend on the number of groups.

Shape suffixes: C tokens of a chunk, V this rank's real vocabulary rows, K entries of a query, L listed ids,
E memberships, J groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusemega.logits._query import LEAST_LEFT, Query, Sums
from fusemega.logits.groups import Groups


class Listed:
    """What the query of one chunk lists.

    Args:
        query: cut to the chunk's rows.
        logits_CV: this rank's logits of the chunk.
        first_id: the id of the first column of the logits.
        vocab_size: real vocabulary over all ranks.
    """

    def __init__(self, query: Query, logits_CV: Tensor, first_id: int, vocab_size: int) -> None:
        self.query = query
        self.grouped = query.groups is not None and query.groups.num_groups > 0 and query.ids_TK.numel() > 0
        self._logits_CV, self._first_id = logits_CV, first_id
        self._ids_CL = query.ids_TK
        self._weight_CL: Tensor | None = None
        if self.grouped:
            assert query.groups is not None
            self._ids_CL, self._entry_CL, weight_CL = written_out(query.ids_TK, query.groups, vocab_size)
            self._weight_CL = None if weight_CL is None else weight_CL.to(logits_CV.dtype)

    def columns(self, block: slice) -> Tensor:
        """Column of each listed id in the block's scratch; ids that live elsewhere, and padding, point at the sink."""
        column_CL = self._ids_CL - (self._first_id + block.start)
        inside = (column_CL >= 0) & (column_CL < block.stop - block.start)
        return torch.where(inside, column_CL, block.stop - block.start)

    def take_out(self, wide: Tensor, block: slice, *, logits: bool) -> None:
        """Leaves the ids that are not listed in a block's scratch of logits, or of their exponentials.

        A listed id becomes -inf, or 0. With weights it may be listed in part: then its logit stays, or the part of
        its exponential that is left.
        """
        columns_CL, nothing = self.columns(block), -torch.inf if logits else 0.0
        if self._weight_CL is None:
            wide.scatter_(1, columns_CL, nothing)
            return
        value_CL = wide.gather(1, columns_CL)
        taken = wide.scatter_(1, columns_CL, 0.0).scatter_add_(1, columns_CL, self._weight_CL)
        left_CL = 1.0 - taken.gather(1, columns_CL)
        part_CL = value_CL if logits else value_CL * left_CL
        # An id that is listed more than once gets the same number each time.
        wide.scatter_(1, columns_CL, torch.where(left_CL > LEAST_LEFT, part_CL, nothing))

    def logits(self) -> Tensor:
        """Logits [C, K] of the listed ids on this rank, 0 for the others; the sum over ranks has the logits of all."""
        return self._own_logits(0.0)

    def peaks(self) -> Tensor:
        """Largest logit [C, K] on this rank of each entry's ids, -inf where it has none."""
        peak_CK = self._logits_CV.new_full(self._wide_shape(), -torch.inf)
        return peak_CK.scatter_reduce_(1, self._entry_CL, self._own_logits(-torch.inf), "amax")[:, :-1]

    def sums(self, peak_CK: Tensor) -> Tensor:
        """sum_v w_v exp((logit_v - peak) / temperature) [C, K] over this rank's ids of each entry."""
        sum_CK = peak_CK.new_zeros(self._wide_shape())
        return sum_CK.scatter_add_(1, self._entry_CL, self._exponentials(peak_CK))[:, :-1]

    def slopes(self, d_logp_CK: Tensor, sums: Sums) -> Tensor:
        """What the gradients of the entries' log-probs pass on to the logit of each listed id [C, L]."""
        slope_CK = d_logp_CK / self.query.temperature
        if not self.grouped:
            return slope_CK
        assert sums.entry_peak_CK is not None and sums.entry_sum_CK is not None
        slope_CK = torch.where(sums.entry_sum_CK > 0, slope_CK / sums.entry_sum_CK, 0.0)
        return self._of_entry(slope_CK) * self._exponentials(sums.entry_peak_CK)

    def _own_logits(self, elsewhere: float) -> Tensor:
        here = self._logits_CV.shape[1]
        if here == 0:
            return self._logits_CV.new_full(self._ids_CL.shape, elsewhere)
        column_CL = self._ids_CL - self._first_id
        inside = (column_CL >= 0) & (column_CL < here)
        return torch.where(inside, self._logits_CV.gather(1, column_CL.clamp(0, here - 1)), elsewhere)

    def _exponentials(self, peak_CK: Tensor) -> Tensor:
        """w_v exp((logit_v - peak) / temperature) of each listed id, relative to its own entry's peak; 0 elsewhere."""
        peak_CL = self._of_entry(torch.where(peak_CK > -torch.inf, peak_CK, 0.0))
        exp_CL = ((self._own_logits(-torch.inf) - peak_CL) / self.query.temperature).exp()
        return exp_CL if self._weight_CL is None else exp_CL * self._weight_CL

    def _of_entry(self, value_CK: Tensor) -> Tensor:
        return value_CK.gather(1, self._entry_CL.clamp(max=value_CK.shape[1] - 1))

    def _wide_shape(self) -> tuple[int, int]:
        tokens, entries = self.query.ids_TK.shape
        return tokens, entries + 1


def written_out(ids_CK: Tensor, groups: Groups, vocab_size: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The ids that the entries of each row stand for, one after another; behind them id -1 of the entry K.

    Returns:
        ids_CL, entry_CL: int64; weight_CL, if the groups have weights: that of each id, 1 for a plain one.
    """
    tokens, entries = ids_CK.shape
    is_group_CK = ids_CK >= vocab_size
    group_CK = (ids_CK - vocab_size).clamp(min=0)
    count_CK = torch.where(is_group_CK, groups.count_J[group_CK], (ids_CK >= 0).long())
    stop_CK = count_CK.cumsum(1)
    length = int(stop_CK[:, -1].max()) if ids_CK.is_cpu else groups.most_members(entries)
    at_CL = torch.arange(length, device=ids_CK.device).expand(tokens, length).contiguous()
    entry_CL = torch.searchsorted(stop_CK, at_CL, right=True)
    known_CL = entry_CL.clamp(max=entries - 1)  # the entry K, past the row's ids, is none
    # Place among all memberships of the first member of each entry, less the entry's own start in the row.
    offset_CK = groups.start_J[group_CK] - (stop_CK - count_CK)
    place_CL = (at_CL + offset_CK.gather(1, known_CL)).clamp(0, len(groups.members_E) - 1)
    of_group_CL = is_group_CK.gather(1, known_CL)
    ids_CL = torch.where(of_group_CL, groups.members_E[place_CL], ids_CK.gather(1, known_CL))
    ids_CL = torch.where(entry_CL < entries, ids_CL, -1)
    weight_CL = None if groups.weight_E is None else torch.where(of_group_CL, groups.weight_E[place_CL], 1.0)
    return ids_CL, entry_CL, weight_CL
