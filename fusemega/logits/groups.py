"""Groups of vocabulary ids that a query may list like ids: the probability of a group is the (weighted) sum of theirs.

Shape suffixes: E memberships (an id in a group), J groups.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor


class Groups:
    """`num_groups` groups of vocabulary ids; the same on every rank of the tensor-parallel group.

    In `Query.ids_TK` the id `vocab_size + j` stands for group j, whose log-probability is

        log sum_{v in group j} w_v softmax(logits / temperature)_v

    An id may be in several groups, and need not be in any.

    Args:
        members_E: int64 vocabulary ids, in any order.
        group_E: int64, the group of each member, 0 to num_groups - 1. No group is empty.
        num_groups: 0 is allowed: then a query can list ids only.
        weight_E: floating, above 0 and at most 1; None: all 1.

    The tensors are on the CPU, because they are checked here; `to` copies the groups to a device.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, ids below 0, groups outside the range or empty, an id
            twice in one group, weights outside the range.

    Example:
        >>> groups = Groups(torch.tensor([7, 3, 4]), torch.tensor([0, 1, 1]), 2)
        >>> groups.num_groups, groups.largest_id, groups.most_members(2)
        (2, 7, 3)
    """

    def __init__(self, members_E: Tensor, group_E: Tensor, num_groups: int, weight_E: Tensor | None = None) -> None:
        _check(members_E, group_E, num_groups, weight_E)
        order_E = torch.argsort(group_E, stable=True)
        self.num_groups = num_groups
        # The members of group j are members_E[start_J[j] : start_J[j] + count_J[j]].
        self.members_E = members_E[order_E]
        self.weight_E = None if weight_E is None else weight_E[order_E]
        self.count_J = torch.bincount(group_E, minlength=num_groups)
        self.start_J = self.count_J.cumsum(0) - self.count_J
        if num_groups and int(self.count_J.min()) == 0:
            raise ValueError(f"group {int(self.count_J.argmin())}: has no members, and so no log-probability")
        self.largest_id = int(members_E.max()) if len(members_E) else -1
        self._largest_sums = [0, *accumulate(self.count_J.sort(descending=True).values.tolist())]
        self._copies: dict[torch.device, Groups] = {self.members_E.device: self}

    def to(self, device: torch.device) -> Groups:
        """These groups on `device`, copied there the first time."""
        if device not in self._copies:
            copy = object.__new__(Groups)
            copy.__dict__ = {
                name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.__dict__.items()
            }
            self._copies[device] = copy
        return self._copies[device]

    def most_members(self, entries: int) -> int:
        """The most ids that `entries` distinct groups and plain ids can stand for; known without reading a device."""
        groups = min(entries, self.num_groups)
        return self._largest_sums[groups] + entries - groups


def _check(members_E: Tensor, group_E: Tensor, num_groups: int, weight_E: Tensor | None) -> None:
    for name, tensor in (("members", members_E), ("group", group_E)):
        if tensor.dim() != 1 or tensor.dtype != torch.int64 or not tensor.is_cpu or len(tensor) != len(members_E):
            raise ValueError(
                f"{name} {list(tensor.shape)} of {tensor.dtype} on {tensor.device}: expected int64 [{len(members_E)}] "
                "on the CPU"
            )
    if num_groups < 0:
        raise ValueError(f"num_groups {num_groups}: expected 0 or more")
    if weight_E is not None:
        if weight_E.shape != members_E.shape or not weight_E.is_floating_point() or not weight_E.is_cpu:
            raise ValueError(
                f"weight {list(weight_E.shape)} of {weight_E.dtype} on {weight_E.device}: expected floating "
                f"[{len(members_E)}] on the CPU"
            )
        if not bool(((weight_E > 0) & (weight_E <= 1)).all()):
            raise ValueError("weight: expected numbers above 0 and at most 1")
    if not len(members_E):
        return
    if int(members_E.min()) < 0:
        raise ValueError(f"members from {int(members_E.min())}: expected vocabulary ids, 0 or more")
    if int(group_E.min()) < 0 or int(group_E.max()) >= num_groups:
        raise ValueError(f"group from {int(group_E.min())} to {int(group_E.max())}: expected 0 to {num_groups - 1}")
    key_E = (group_E * (int(members_E.max()) + 1) + members_E).sort().values
    twice = key_E[1:][key_E[1:] == key_E[:-1]]
    if len(twice):
        group, member = divmod(int(twice[0]), int(members_E.max()) + 1)
        raise ValueError(f"group {group}: id {member} twice")
