"""An all-reduce of all ranks, and of those of each node: is the sum right, and how fast is it.

The bandwidth is NCCL's bus bandwidth, 2 (n - 1) / n x bytes / seconds, which does not depend on the number of ranks n.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

MIB = 1 << 20
SIZES_GPU, SIZES_CPU = (1 * MIB, 32 * MIB, 512 * MIB), (MIB // 4, 1 * MIB, 8 * MIB)
_WARM_UP, _TIMES = 2, 5


@dataclass(frozen=True)
class Measured:
    """One size on one group.

    Attributes:
        group: "all", or the node whose ranks it was.
        bytes: of the tensor of each rank.
        seconds: of one all-reduce, the median.
        gb_per_second: the bus bandwidth, in 10^9 bytes a second; 0 for a group of one rank.
        is_right: whether the sum was.
    """

    group: str
    bytes: int
    seconds: float
    gb_per_second: float
    is_right: bool


def measure(nodes: Sequence[str], rank: int, device: torch.device) -> list[Measured]:
    """All sizes on all ranks, and the largest on the ranks of this node. Collective.

    Args:
        nodes: the node of each rank.
    """
    sizes = SIZES_GPU if device.type == "cuda" else SIZES_CPU
    everyone = dist.group.WORLD
    assert everyone is not None
    found = [_measure("all", everyone, range(len(nodes)), rank, size, device) for size in sizes]
    for node in dict.fromkeys(nodes):
        members = [other for other, its in enumerate(nodes) if its == node]
        group = dist.new_group(members)
        if rank in members and 1 < len(members) < len(nodes):
            assert group is not None
            found.append(_measure(node, group, members, rank, sizes[-1], device))
        dist.all_reduce(torch.zeros(1, device=device))  # one node at a time, so that none slows another down
        _wait(device)
    return found


def _measure(
    name: str, group: dist.ProcessGroup, members: Sequence[int], rank: int, size: int, device: torch.device
) -> Measured:
    count, ranks = size // 4, len(members)
    pattern = torch.arange(count, dtype=torch.float32, device=device).remainder_(7).add_(1)
    expected = pattern * sum(member + 1 for member in members)
    tensor, times, is_right = torch.empty_like(pattern), [], True
    for turn in range(_WARM_UP + _TIMES):
        torch.mul(pattern, rank + 1, out=tensor)
        _wait(device)
        started = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        _wait(device)
        if turn >= _WARM_UP:
            times.append(time.perf_counter() - started)
        is_right = is_right and torch.equal(tensor, expected)  # whole numbers below 2^24: the sum is exact
    seconds = sorted(times)[len(times) // 2]
    return Measured(name, size, seconds, 2 * (ranks - 1) / ranks * size / seconds / 1e9, is_right)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
