"""Rotary positions of packed rows; the cosines and sines of a row are computed once for all layers.

megatron-core computes them again in each layer, for queries and for keys, and each time reads the row's bounds from the
device (models/common/embeddings/rope_utils.py:122, :188), so on a GPU the host waits twice in each layer. Here the
bounds come from `segments`, and the angles are kept until the next row.

Shape suffixes: T tokens of this rank, S positions that have frequencies, N heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusemega.runtime import cpu_ops
from fusemega.runtime.segments import Segments, segments_of


class PackedRope:
    """Stands in for megatron-core's `apply_rotary_pos_emb`.

    Args:
        plain: megatron-core's own, for all except packed rows whose whole heads are rotated.
    """

    def __init__(self, plain: Callable[..., Tensor]) -> None:
        self._plain = plain
        self._row: tuple[Any, ...] = ()
        self._angles: tuple[Tensor, Tensor]

    def __call__(
        self,
        t: Tensor,
        freqs: Tensor,
        config: Any,
        cu_seqlens: Tensor | None = None,
        mscale: float = 1.0,
        cp_group: Any = None,
    ) -> Tensor:
        whole_heads = freqs.size(-1) == t.size(-1) and not config.rotary_interleaved and mscale == 1.0
        if cu_seqlens is None or not whole_heads or config.apply_rope_fusion:
            return self._plain(t, freqs, config, cu_seqlens, mscale, cp_group)
        # Compared by identity, because comparing values would wait for the device.
        row = (cu_seqlens, freqs, t.dtype)
        if not (self._row and all(a is b for a, b in zip(self._row, row, strict=True))):
            rank, size = (0, 1) if cp_group is None else (cp_group.rank(), cp_group.size())
            angles_T1D = _angles(freqs, segments_of(cu_seqlens), rank, size)
            self._angles = angles_T1D.cos().to(t.dtype), angles_T1D.sin().to(t.dtype)
            self._row = row
        return cpu_ops.rotate(t, *self._angles) if t.is_cpu else _rotate(t, *self._angles)


def install() -> None:
    """Puts `PackedRope` into megatron-core's attention, in this process. Idempotent."""
    from megatron.core.transformer import attention

    patched: Any = attention
    if not isinstance(attention.apply_rotary_pos_emb, PackedRope):
        patched.apply_rotary_pos_emb = PackedRope(attention.apply_rotary_pos_emb)


def _angles(freqs_S11D: Tensor, segments: Segments, rank: int, size: int) -> Tensor:
    """Angles [T, 1, D] of this rank's tokens. Positions restart at each segment, or go on from the end of what it
    continues; CP ranks have two pieces of each."""
    pieces = (0,) if size == 1 else (rank, 2 * size - 1 - rank)
    parts = []
    for before, length in zip(segments.before, segments.lengths, strict=True):
        piece = length if size == 1 else length // (2 * size)
        parts += [freqs_S11D[before + at * piece : before + (at + 1) * piece, 0] for at in pieces]
    return torch.cat(parts)


def _rotate(t_TND: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    first, second = t_TND.chunk(2, dim=2)
    return t_TND * cos_T1D + torch.cat((-second, first), dim=2) * sin_T1D
