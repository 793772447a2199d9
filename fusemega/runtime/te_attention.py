"""Transformer Engine's core attention, except for rows with shared prompts. Importable where Transformer Engine is.

Shape suffixes: T tokens of a packed row, N query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from fusemega.runtime.segments import segments_of
from fusemega.runtime.shared_prompts import attend_with_prefixes


class PrefixDotProductAttention(TEDotProductAttention):
    """Megatron's TEDotProductAttention; a row in which segments continue others goes to `shared_prompts`."""

    def __init__(self, config: TransformerConfig, layer_number: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, layer_number, *args, **kwargs)
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self._tokens_before = config.window_size[0] if windowed else None
        self._scale: float | None = kwargs.get("softmax_scale")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Packed rows: query [T, N, D] with key, value [T, G, D] -> [T, N*D]; else as Megatron's."""
        if packed_seq_params is not None and packed_seq_params.cu_seqlens_q is not None:
            segments = segments_of(packed_seq_params.cu_seqlens_q)
            if segments.has_prefixes:
                return attend_with_prefixes(query, key, value, segments, self._tokens_before, self._scale)
        out: Tensor = super().forward(query, key, value, *args, packed_seq_params=packed_seq_params, **kwargs)
        return out
