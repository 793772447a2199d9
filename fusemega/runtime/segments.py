"""The segments of a packed row, known on the host.

Every layer needs the bounds of the samples in its row. They are in `cu_seqlens`, a tensor on the device, and to read it
the host must wait for all queued work. So the code that builds a row keeps its bounds, and `known` connects them with
the tensor that Megatron passes from layer to layer. Only a row without known bounds is read, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import groupby, pairwise

import torch
from torch import Tensor

from fusemega.runtime.context_parallel import zigzag

_ATTRIBUTE = "fusemega_segments"


class Segments:
    """Where the segments of one row are.

    Args:
        bounds: of the whole row, as in cu_seqlens: the first is 0, the last the row's length.
    """

    def __init__(self, bounds: Sequence[int]) -> None:
        self.bounds = tuple(bounds)
        self._orders: dict[tuple[int, torch.device], Tensor] = {}

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each segment."""
        return [end - start for start, end in pairwise(self.bounds)]

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """(length, how many) of neighbouring segments of one length."""
        return [(length, len(list(run))) for length, run in groupby(self.lengths)]

    def zigzag_order(self, size: int, device: torch.device) -> Tensor:
        """int64 [T] on `device`: the places in the row of the tokens of context-parallel rank 0, then 1, ..."""
        if (size, device) not in self._orders:
            bounds = torch.tensor(self.bounds, dtype=torch.int32, device="cpu")
            order = torch.cat([zigzag(bounds, rank, size) for rank in range(size)])
            self._orders[size, device] = order.to(device)
        return self._orders[size, device]


def known(cu_seqlens: Tensor, bounds: Sequence[int]) -> Tensor:
    """Gives `cu_seqlens` its bounds, so that its values need not be read from now on. Returns it.

    Args:
        cu_seqlens: int32 [segments + 1], on any device.
        bounds: the same numbers.
    """
    if not hasattr(cu_seqlens, _ATTRIBUTE):
        setattr(cu_seqlens, _ATTRIBUTE, Segments(bounds))
    return cu_seqlens


def segments_of(cu_seqlens: Tensor) -> Segments:
    """The segments of a row. Without a call of `known` they are read from the device, the first time."""
    if not hasattr(cu_seqlens, _ATTRIBUTE):
        known(cu_seqlens, cu_seqlens.tolist())
    found: Segments = getattr(cu_seqlens, _ATTRIBUTE)
    return found
