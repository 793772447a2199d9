"""The ids that a chunk's query lists, on this rank.

Shape suffixes: C tokens of a chunk, V this rank's real vocabulary rows, B rows of one vocabulary block, K entries of a
query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusemega.logits._query import Query, Sums


class Listed:
    """What a query without groups lists: its ids.

    Args:
        query: cut to the chunk's rows.
        logits_CV: this rank's logits of the chunk.
        first_id: the id of the first column of the logits.

    `wide` is a block's scratch [C, B + SINK], whose spare columns take what is written to ids that live elsewhere.
    """

    def __init__(self, query: Query, logits_CV: Tensor, first_id: int) -> None:
        self.query, self._logits_CV, self._first_id = query, logits_CV, first_id

    def take_out(self, wide: Tensor, block: slice, *, logits: bool) -> None:
        """Leaves the ids that are not listed in a block of logits (the others become -inf) or exponentials (0)."""
        wide.scatter_(1, self._columns(block), -torch.inf if logits else 0.0)

    def logits(self) -> Tensor:
        """Logits [C, K] of the listed ids on this rank, 0 for the others; the sum over ranks has the logits of all."""
        here = self._logits_CV.shape[1]
        if here == 0:
            return self._logits_CV.new_zeros(self.query.ids_TK.shape)
        column_CK = self.query.ids_TK - self._first_id
        inside = (column_CK >= 0) & (column_CK < here)
        return torch.where(inside, self._logits_CV.gather(1, column_CK.clamp(0, here - 1)), 0.0)

    def slopes(self, d_logp_CK: Tensor, sums: Sums) -> Tensor:
        """What the gradients of the log-probs pass on to the logit of each listed id, in the order of `add`."""
        return d_logp_CK / self.query.temperature

    def add(self, wide: Tensor, block: slice, slopes: Tensor) -> None:
        wide.scatter_add_(1, self._columns(block), slopes)

    def _columns(self, block: slice) -> Tensor:
        """Column of each id in the block's scratch; ids that live elsewhere, and padding, point at the sink."""
        column_CK = self.query.ids_TK - (self._first_id + block.start)
        inside = (column_CK >= 0) & (column_CK < block.stop - block.start)
        return torch.where(inside, column_CK, block.stop - block.start)
