"""The ids that a chunk's query lists, if it lists groups: every entry is written out as its members.

All entries of a chunk become one list of L ids. On a CPU it has their number; on a GPU, where reading that would wait
for the device, room for any K groups a token. So the cost depends on the sizes of the listed groups, most of which are
small, and not on the number of groups or the size of the vocabulary.

Shape suffixes: C tokens of a chunk, V this rank's real vocabulary rows, B rows of one vocabulary block, K entries of a
query, N entries of the chunk (C times K), L listed ids, E memberships, J groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusemega.logits._listed import Listed
from fusemega.logits._query import LEAST_LEFT, Query, Sums
from fusemega.logits.groups import Groups


class ListedMembers(Listed):
    """What a query with groups lists: the members of its groups, and its ids, each of them a group of one.

    Args:
        groups: those of the query, at least one; the query has at least one entry.
        vocab_size: real vocabulary over all ranks.
        (others): as in `Listed`.
    """

    def __init__(self, query: Query, groups: Groups, logits_CV: Tensor, first_id: int, vocab_size: int) -> None:
        super().__init__(query, logits_CV, first_id)
        self._ids_L, self._entry_L, weight_L = written_out(query.ids_TK, groups, vocab_size)
        self._weight_L = None if weight_L is None else weight_L.to(logits_CV.dtype)
        self._token_L = self._entry_L // query.ids_TK.shape[1]
        self._logits_L = self._own_logits()
        self._exp_L: Tensor | None = None
        self._found: dict[int, tuple[Tensor, Tensor]] = {}

    def take_out(self, wide: Tensor, block: slice, *, logits: bool) -> None:
        """As `Listed.take_out`. With weights an id may be listed in part: its logit stays, or the part that is left."""
        flat, nothing = _flat(wide), -torch.inf if logits else 0.0
        chosen, place_L = self._places(wide, block)
        if self._weight_L is None:
            flat.index_fill_(0, place_L, nothing)
            return
        value_L = flat[place_L]
        flat.index_fill_(0, place_L, 0.0).index_add_(0, place_L, self._weight_L[chosen])
        left_L = 1.0 - flat[place_L]
        part_L = value_L if logits else value_L * left_L
        # An id that is listed more than once gets the same number each time.
        flat.scatter_(0, place_L, torch.where(left_L > LEAST_LEFT, part_L, nothing))

    def peaks(self) -> Tensor:
        """Largest logit [C, K] on this rank of each entry's ids, -inf where it has none."""
        peak_N = self._logits_CV.new_full((self.query.ids_TK.numel(),), -torch.inf)
        return peak_N.scatter_reduce_(0, self._entry_L, self._logits_L, "amax").view_as(self.query.ids_TK)

    def sums(self, peak_CK: Tensor) -> Tensor:
        """sum_v w_v exp((logit_v - peak) / temperature) [C, K] over this rank's ids of each entry."""
        self._exp_L = self._exponentials(peak_CK)
        sum_N = peak_CK.new_zeros(peak_CK.numel())
        return sum_N.index_add_(0, self._entry_L, self._exp_L).view_as(peak_CK)

    def slopes(self, d_logp_CK: Tensor, sums: Sums) -> Tensor:
        """[L]: an entry's gradient is shared by its ids."""
        assert sums.entry_peak_CK is not None and sums.entry_sum_CK is not None
        slope_CK = torch.where(sums.entry_sum_CK > 0, d_logp_CK / self.query.temperature / sums.entry_sum_CK, 0.0)
        exp_L = self._exponentials(sums.entry_peak_CK) if self._exp_L is None else self._exp_L
        return exp_L * self._of_entry(slope_CK)

    def add(self, wide: Tensor, block: slice, slopes: Tensor) -> None:
        chosen, place_L = self._places(wide, block)
        _flat(wide).index_add_(0, place_L, slopes[chosen])

    def _places(self, wide: Tensor, block: slice) -> tuple[Tensor | slice, Tensor]:
        """Which of the ids are in the block, and their places in `_flat(wide)`.

        On a device all are chosen: what lives elsewhere, or is none, has its place in the sink of its token's row.
        """
        if block.start in self._found:
            return self._found[block.start]
        width = block.stop - block.start
        column_L = self._ids_L - (self._first_id + block.start)
        inside = (column_L >= 0) & (column_L < width)
        if not may_read(column_L):
            return slice(None), torch.where(inside, column_L, width).add_(self._token_L, alpha=wide.stride(0))
        chosen = inside.nonzero()[:, 0]
        place_L = column_L[chosen].add_(self._token_L[chosen], alpha=wide.stride(0))
        self._found[block.start] = chosen, place_L
        return chosen, place_L

    def _own_logits(self) -> Tensor:
        """[L], -inf for ids of other ranks."""
        here = self._logits_CV.shape[1]
        if here == 0:
            return self._logits_CV.new_full(self._ids_L.shape, -torch.inf)
        column_L = self._ids_L - self._first_id
        inside = (column_L >= 0) & (column_L < here)
        place_L = column_L.clamp_(0, here - 1).add_(self._token_L, alpha=self._logits_CV.stride(0))
        return torch.where(inside, _flat(self._logits_CV)[place_L], -torch.inf)

    def _exponentials(self, peak_CK: Tensor) -> Tensor:
        """w_v exp((logit_v - peak) / temperature) of each listed id, relative to its own entry's peak; 0 elsewhere."""
        peak_L = self._of_entry(torch.where(peak_CK > -torch.inf, peak_CK, 0.0))
        exp_L = self._logits_L - peak_L
        if self.query.temperature != 1.0:
            exp_L.div_(self.query.temperature)
        exp_L.exp_()
        return exp_L if self._weight_L is None else exp_L.mul_(self._weight_L)

    def _of_entry(self, value_CK: Tensor) -> Tensor:
        return value_CK.reshape(-1)[self._entry_L]


def _flat(rows: Tensor) -> Tensor:
    """A view of rows and of what lies between them as one row."""
    return rows.as_strided(((len(rows) - 1) * rows.stride(0) + rows.shape[1],), (1,))


def written_out(ids_CK: Tensor, groups: Groups, vocab_size: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The ids that the entries stand for, one entry after another, and -1 where the list has room to spare.

    Returns:
        ids_L, entry_L: int64, entry k of token c being c * K + k; weight_L, if the groups have weights: that of each
        id, 1 for a plain one.
    """
    ids_N = ids_CK.reshape(-1)
    is_group_N = ids_N >= vocab_size
    group_N = (ids_N - vocab_size).clamp_(min=0)
    count_N = torch.where(is_group_N, groups.count_J[group_N], (ids_N >= 0).long())
    stop_N = count_N.cumsum(0)
    length = int(stop_N[-1]) if may_read(ids_N) else len(ids_CK) * groups.most_members(ids_CK.shape[1])
    at_L = torch.arange(length, device=ids_N.device)
    # The last repeat fills the list up, so that the operation need not read its length.
    entry_L = torch.repeat_interleave(torch.cat([count_N, (length - stop_N[-1])[None]]), output_size=length)
    # What is spare belongs to all entries in turn, because atomic operations on one place would wait for each other.
    spare_L = entry_L == len(ids_N)
    entry_L = torch.where(spare_L, at_L % len(ids_N), entry_L)
    # Of each entry: the place of its first member among all memberships, less the start of its own ids in the list.
    offset_N = groups.start_J[group_N] - (stop_N - count_N)
    member_L = at_L.add_(offset_N[entry_L]).clamp_(0, len(groups.members_E) - 1)
    of_group_L = is_group_N[entry_L]
    ids_L = torch.where(of_group_L, groups.members_E[member_L], ids_N[entry_L]).masked_fill_(spare_L, -1)
    weight_L = None if groups.weight_E is None else torch.where(of_group_L, groups.weight_E[member_L], 1.0)
    return ids_L, entry_L, weight_L


def may_read(tensor: Tensor) -> bool:
    """Whether sizes can be read from it without waiting for a device."""
    return tensor.is_cpu
