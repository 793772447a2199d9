"""Partitions of the target's ids into cells, as ids that a query of the kernel may list.

Where a teacher's tokens are others than the target's, a row says how probable a cell of target ids is
(`fusemega.align.cells`). The kernel is asked for a cell of one id by that id, and for any other by the id of a group.

Shape suffixes: V ids of the target's vocabulary, E members of groups, P positions, K listed ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fusemega.align.cells import components
from fusemega.align.projection import sum_duplicates
from fusemega.fusion.targets import Targets


class Partitions:
    """Some partitions, by number. Number 0 is always there: each id is a cell of its own.

    Args:
        cells: for each partition int64 [V], for each id the one that stands for its cell; None: that of number 0.
        vocab_size: V.

    Attributes:
        numbers: the number of each given partition; equal ones have one number.
        member_E, group_E, num_groups: the cells of several ids, of all partitions: int64 ids, int64 group of each.

    Example: ids 1 and 3 are one cell.

        >>> partitions = Partitions([None, np.array([0, 1, 2, 1])], 4)
        >>> partitions.numbers, partitions.query_ids[1].tolist(), partitions.member_E.tolist()
        ([0, 1], [0, 4, 2, 4], [1, 3])
    """

    def __init__(self, cells: Sequence[np.ndarray | None], vocab_size: int) -> None:
        self._own_V = np.arange(vocab_size)
        self.query_ids = [self._own_V]  # of each partition int64 [V]: what a query lists for the cell of an id
        self.numbers: list[int] = []
        known = {self._own_V.tobytes(): 0}
        members: list[np.ndarray] = []
        groups: list[np.ndarray] = []
        count = 0
        for cell_V in cells:
            cell_V = self._own_V if cell_V is None else cell_V.astype(np.int64)
            if cell_V.tobytes() not in known:
                known[cell_V.tobytes()] = len(self.query_ids)
                several_V = np.bincount(cell_V, minlength=vocab_size) > 1
                group_V = (count + np.cumsum(several_V) - 1)[cell_V]
                inside_E = np.flatnonzero(several_V[cell_V])
                self.query_ids.append(np.where(several_V[cell_V], vocab_size + group_V, self._own_V))
                members.append(inside_E)
                groups.append(group_V[inside_E])
                count += int(several_V.sum())
            self.numbers.append(known[cell_V.tobytes()])
        none_E = np.empty(0, dtype=np.int64)
        self.member_E, self.group_E = np.concatenate([none_E, *members]), np.concatenate([none_E, *groups])
        self.num_groups = count

    def queries(self, targets: Targets, labels_P: np.ndarray) -> tuple[Targets, np.ndarray]:
        """The targets with what the kernel is asked for in place of their ids, and int64 [P] for the cell of the label,
        -1 where the label is alone in it."""
        query_V = self.query_ids[targets.partition]
        ids_PK = np.where(targets.ids_PK >= 0, query_V[targets.ids_PK], -1)
        cell_P = query_V[labels_P]
        return replace(targets, ids_PK=ids_PK), np.where(cell_P == labels_P, -1, cell_P)


def joined(cells: Sequence[np.ndarray | None], vocab_size: int) -> np.ndarray | None:
    """int64 [V]: the finest partition that is coarser than all of these; None where each id is a cell of its own.

    >>> joined([np.array([0, 1, 1, 3]), None, np.array([0, 1, 2, 2])], 4).tolist()
    [0, 1, 1, 1]
    """
    tables = [cell_V for cell_V in cells if cell_V is not None]
    if not tables:
        return None
    return components(vocab_size, np.tile(np.arange(vocab_size), len(tables)), np.concatenate(tables))


def coarsened(targets: Targets, cell_V: np.ndarray) -> Targets:
    """Targets with the ids that stand for the cells of a coarser partition: what falls into one cell is added up."""
    ids_PK = np.where(targets.ids_PK >= 0, cell_V[targets.ids_PK], -1)
    ids_PK, logp_PK = sum_duplicates(ids_PK, targets.logp_PK)
    return replace(targets, ids_PK=ids_PK, logp_PK=logp_PK)
