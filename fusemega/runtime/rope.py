"""Rotary positions of packed rows; the cosines and sines of a row are computed once for all layers.

megatron-core computes them again in each layer, for queries and for keys, and each time reads the row's bounds from the
device (models/common/embeddings/rope_utils.py:122, :188), so on a GPU the host waits twice in each layer. Here the
bounds come from `segments`, and the angles are kept until the next row. A part of each head may be rotated, and what
`text_rope` knows is computed: a scale, and frequencies that depend on a text's length.

Shape suffixes: T tokens of this rank, S positions that have frequencies, N heads, D head size, R its rotated part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusemega.runtime import cpu_ops
from fusemega.runtime.device import sent
from fusemega.runtime.segments import Segments, segments_of
from fusemega.runtime.text_rope import TextRope, rope_of


class PackedRope:
    """Stands in for megatron-core's `apply_rotary_pos_emb`.

    Args:
        plain: megatron-core's own, for all except packed rows.
    """

    def __init__(self, plain: Callable[..., Tensor]) -> None:
        self._plain = plain
        self._kept: list[tuple[tuple[Any, ...], tuple[Tensor, Tensor]]] = []

    def __call__(
        self,
        t: Tensor,
        freqs: Tensor,
        config: Any,
        cu_seqlens: Tensor | None = None,
        mscale: float = 1.0,
        cp_group: Any = None,
    ) -> Tensor:
        rope = rope_of(config)
        if cu_seqlens is None or config.rotary_interleaved or mscale != 1.0 or config.apply_rope_fusion:
            if rope.same_up_to is not None and len(freqs) > rope.same_up_to:
                raise ValueError("rotary positions that depend on a text's length need packed rows")
            return self._plain(t, freqs, config, cu_seqlens, mscale * rope.scale, cp_group)
        # Compared by identity, because comparing values would wait for the device.
        row = (cu_seqlens, freqs, t.dtype)
        angles = next((kept for of, kept in self._kept if all(a is b for a, b in zip(of, row, strict=True))), None)
        if angles is None:
            rank, size = (0, 1) if cp_group is None else (cp_group.rank(), cp_group.size())
            angles_T1R = _angles(freqs, segments_of(cu_seqlens), rank, size, rope)
            angles = (angles_T1R.cos() * rope.scale).to(t.dtype), (angles_T1R.sin() * rope.scale).to(t.dtype)
            # Layers with windows may have frequencies of their own: two entries serve both kinds in turn.
            self._kept = [(row, angles), *(entry for entry in self._kept[:1] if entry[0][0] is cu_seqlens)]
        rotate = cpu_ops.rotate if t.is_cpu else _rotate
        size = freqs.size(-1)
        if size == t.size(-1):
            return rotate(t, *angles)
        return torch.cat((rotate(t[..., :size].contiguous(), *angles), t[..., size:]), dim=-1)


def install() -> None:
    """Puts `PackedRope` into megatron-core's attention, in this process. Idempotent."""
    from megatron.core.transformer import attention

    patched: Any = attention
    if not isinstance(attention.apply_rotary_pos_emb, PackedRope):
        patched.apply_rotary_pos_emb = PackedRope(attention.apply_rotary_pos_emb)


def _angles(freqs_S11R: Tensor, segments: Segments, rank: int, size: int, rope: TextRope) -> Tensor:
    """Angles [T, 1, R] of this rank's tokens. Positions restart at each segment, or go on from the end of what it
    continues; CP ranks have two pieces of each."""
    pieces = (0,) if size == 1 else (rank, 2 * size - 1 - rank)
    parts = []
    own: dict[int, Tensor] = {}  # of texts of this length
    for before, length, text in zip(segments.before, segments.lengths, segments.texts, strict=True):
        angles_S1R = freqs_S11R[:, 0]
        if rope.same_up_to is not None and text > rope.same_up_to:
            if text not in own:
                position_S = torch.arange(len(freqs_S11R), dtype=torch.float32, device=freqs_S11R.device)
                half_SR = torch.outer(position_S, sent(rope.frequencies(text), freqs_S11R.device))
                own[text] = torch.cat((half_SR, half_SR), dim=-1)[:, None]
            angles_S1R = own[text]
        piece = length if size == 1 else length // (2 * size)
        parts += [angles_S1R[before + at * piece : before + (at + 1) * piece] for at in pieces]
    return torch.cat(parts)


def _rotate(t_TND: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    first, second = t_TND.chunk(2, dim=2)
    return t_TND * cos_T1D + torch.cat((-second, first), dim=2) * sin_T1D
