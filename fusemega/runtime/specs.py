"""Layer specs: one that needs neither Transformer Engine nor apex, and Transformer Engine's.

Shape suffixes: S sequence (or all tokens T of a packed row, R of them on a context-parallel rank), B batch, N query
heads, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.transformer.utils import is_layer_window_attention

from fusemega.runtime.capped_attention import capped_attention
from fusemega.runtime.context_parallel import gather_row
from fusemega.runtime.cpu_ops import gelu_tanh
from fusemega.runtime.experts import ExpertsLayer, MLPKind, Router, experts_spec
from fusemega.runtime.local_layers import (
    GatedCPUMLP,
    LocalMLP,
    LocalRopeSelfAttention,
    NormedGatedCPUMLP,
    NormedRowParallelLinear,
    RMSNorm,
)
from fusemega.runtime.segments import Segments, segments_of
from fusemega.runtime.shared_prompts import attend_with_prefixes

_NO_NORM = "a norm after a block of experts is in no family, and not made"
_BLOCK = 256  # queries that share one mask, [block, the keys they see] bits


class SDPAttention(MegatronModule):
    """Causal core attention on `scaled_dot_product_attention`, with grouped queries and packed sequences.

    A packed row ("thd") is one attention call a run of equally long segments: block-diagonal without ever holding a
    [T, T] mask, and no work between segments. In a layer with a sliding window (`config.window_size` = (W, 0): a query
    sees W tokens before itself), a segment longer than the window goes block of queries by block, each against the keys
    it can see. The responses to a shared prompt attend to its keys and their own; on a GPU such a row is one call of
    `shared_prompts`.

    With a `softcap` every row goes block by block, on any device (`capped_attention`).

    Under context parallelism, which takes packed rows only, keys and values of the whole row are gathered, and each of
    the two pieces of a segment that this rank holds attends to those up to its end.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.softcap = softcap
        self.cp_group = None
        if config.context_parallel_size > 1:
            if pg_collection is None:
                raise ValueError("SDPAttention: context parallelism needs the process groups")
            self.cp_group = pg_collection.cp
        if attn_mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal):
            raise ValueError(f"SDPAttention is causal; layer {layer_number} asks for {attn_mask_type}")
        self.softmax_scale = softmax_scale
        self.window: int | None = None
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
            self.window, ahead = config.window_size
            if self.window < 0 or ahead != 0:
                raise ValueError(f"SDPAttention: window_size {config.window_size} is not (tokens before the query, 0)")
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if softcap is not None and self.dropout:
            raise ValueError("SDPAttention: capped scores have no dropout")

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """query [S, B, N, D] with key, value [S, B, G, D] -> [S, B, N*D]; packed: [T, N, D] -> [T, N*D].

        Under context parallelism T is this rank's part, in zigzag order, and cu_seqlens are those of the whole row.
        """
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("SDPAttention takes no mask or bias: it is causal, and packed rows bring cu_seqlens")
        if packed_seq_params is None:
            if self.cp_group is not None:
                raise ValueError("SDPAttention: context parallelism needs packed rows")
            query_BNSD, key_BGSD, value_BGSD = (t.permute(1, 2, 0, 3) for t in (query, key, value))
            out_BNSD = self._attend(query_BNSD, key_BGSD, value_BGSD)
            return out_BNSD.permute(2, 0, 1, 3).flatten(2)
        segments = segments_of(packed_seq_params.cu_seqlens_q)
        if self.cp_group is not None:
            return self._shared_row(query, key, value, segments)
        if segments.has_prefixes and query.is_cuda and self.softcap is None:
            return attend_with_prefixes(query, key, value, segments, self.window, self.softmax_scale)
        sizes = [run.length * run.number for run in segments.runs]
        queries, keys, values = (
            [
                part.unflatten(0, (run.number, run.length)).transpose(1, 2)
                for run, part in zip(segments.runs, t.split(sizes), strict=True)
            ]
            for t in (query, key, value)
        )
        parts = []
        for place, run in enumerate(segments.runs):
            seen = [keys[place], values[place]]
            if run.prompt is not None:
                prompt = (t[run.prompt][:, :, : run.seen].expand(run.number, -1, -1, -1) for t in (keys, values))
                seen = [torch.cat(pair, dim=2) for pair in zip(prompt, seen, strict=True)]
            parts.append(self._attend(queries[place], *seen).transpose(1, 2).flatten(0, 1))
        return torch.cat(parts).flatten(1)

    def _shared_row(
        self, query_RND: torch.Tensor, key_RGD: torch.Tensor, value_RGD: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """This rank's part of a row that the context-parallel ranks share."""
        assert self.cp_group is not None
        rank, size = self.cp_group.rank(), self.cp_group.size()
        order = segments.zigzag_order(size, key_RGD.device)
        # Keys and values together, by one collective.
        both_T2GD = gather_row(torch.stack([key_RGD, value_RGD], dim=1), order, self.cp_group)
        key_TGD, value_TGD = both_T2GD.unbind(1)
        parts, place = [], 0
        for start, segment, (first, end) in zip(segments.bounds, segments.lengths, segments.prefixes, strict=False):
            length = segment // (2 * size)
            for piece in (rank, 2 * size - 1 - rank):
                own = slice(start, start + (piece + 1) * length)
                seen = [torch.cat([t[first:end], t[own]]) if end > first else t[own] for t in (key_TGD, value_TGD)]
                parts.append(self._segment(query_RND[place : place + length], *seen))
                place += length
        return torch.cat(parts).flatten(1)

    def _segment(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The last tokens of a segment: [queries, N, D], which see keys [S, G, D] up to their own."""
        return self._attend(*(t.transpose(0, 1)[None] for t in (query, key, value)))[0].transpose(0, 1)

    def _attend(self, query_BNSD: torch.Tensor, key_BGSD: torch.Tensor, value_BGSD: torch.Tensor) -> torch.Tensor:
        length, keys = query_BNSD.size(2), key_BGSD.size(2)
        window = keys if self.window is None else self.window
        # Where the window cuts no key off, attention is plainly causal and needs no mask.
        if length == keys and keys <= window + 1 and self.softcap is None:
            return self._sdpa(query_BNSD, key_BGSD, value_BGSD)
        # Else a mask: with fewer queries than keys, `is_causal` would take the queries for the first tokens.
        before = keys - length
        position_S = torch.arange(keys, device=query_BNSD.device)
        parts = []
        for start in range(0, length, _BLOCK):
            end = min(start + _BLOCK, length)
            seen = slice(max(0, before + start - window), before + end)
            back = position_S[before + start : before + end, None] - position_S[None, seen]
            mask = (back >= 0) & (back <= window)
            parts.append(self._sdpa(query_BNSD[:, :, start:end], key_BGSD[:, :, seen], value_BGSD[:, :, seen], mask))
        return torch.cat(parts, dim=2)

    def _sdpa(
        self,
        query_BNSD: torch.Tensor,
        key_BGSD: torch.Tensor,
        value_BGSD: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Causal without a mask; else each query sees the keys where the mask [queries, keys] is true."""
        if self.softcap is not None:
            assert mask is not None
            scale = query_BNSD.size(3) ** -0.5 if self.softmax_scale is None else self.softmax_scale
            return capped_attention(query_BNSD, key_BGSD, value_BGSD, mask, scale, self.softcap)
        return F.scaled_dot_product_attention(
            query_BNSD,
            key_BGSD,
            value_BGSD,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.softmax_scale,
            enable_gqa=query_BNSD.size(1) != key_BGSD.size(1),
        )


@dataclass(frozen=True)
class LayerSettings:
    """What TransformerConfig has no place for, of all layers of a model.

    Attributes:
        norms_after: whether each block ends in a norm of what it adds to the stream; not of experts.
        softcap: scores of attention become softcap * tanh(scores / softcap); None: they stay.
        local_rope: rotary frequencies of the layers with a sliding window; None: those of all layers.
    """

    norms_after: bool = False
    softcap: float | None = None
    local_rope: RotaryEmbedding | None = None


PLAIN = LayerSettings()


def layer_spec(
    config: TransformerConfig,
    has_attention: bool = True,
    mlp: MLPKind | None = "mlp",
    settings: LayerSettings = PLAIN,
) -> ModuleSpec:
    """One decoder layer: megatron-core's local spec with the modules above.

    Args:
        has_attention, mlp: what the layer has. Identities replace a missing block, its norm and its sum.
    """
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    one_pass = config.gated_linear_unit and config.activation_func in (F.silu, gelu_tanh) and not config.add_bias_linear
    on_cpu = one_pass and not torch.cuda.is_available()  # `cpu_ops` is written for CPUs
    if settings.norms_after:
        if mlp == "experts":
            raise ValueError(_NO_NORM)
        spec.submodules.mlp.submodules.linear_fc2 = NormedRowParallelLinear
        spec.submodules.self_attention.submodules.linear_proj = NormedRowParallelLinear
    if mlp == "experts":
        spec.module = ExpertsLayer
        spec.submodules.mlp = experts_spec(GatedCPUMLP if on_cpu else LocalMLP)
        # No module has the norm's weight inside it, so it keeps its own name in a checkpoint.
        spec.submodules.sharded_state_dict_keys_map = {
            name: key
            for name, key in spec.submodules.sharded_state_dict_keys_map.items()
            if name != "pre_mlp_layernorm."
        }
    elif on_cpu:
        spec.submodules.mlp = NormedGatedCPUMLP if settings.norms_after else GatedCPUMLP
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = partial(SDPAttention, softcap=settings.softcap)
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return _with_blocks(spec, has_attention, mlp)


def _te_layer_spec(
    config: TransformerConfig, has_attention: bool, mlp: MLPKind | None, settings: LayerSettings
) -> ModuleSpec:
    """One decoder layer of Transformer Engine's modules. Its attention has no cap: with one, it is that of here.

    The products of a rank's experts are grouped. (megatron-core's other grouped experts, of the package grouped_gemm,
    have all experts in one transposed tensor, and are to be removed there.)
    """
    from fusemega.runtime.te_attention import PrefixDotProductAttention
    from fusemega.runtime.te_norm import NormedTERowParallelLinear

    experts = config.num_moe_experts if mlp == "experts" else None
    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=experts, moe_grouped_gemm=True, qk_layernorm=config.qk_layernorm
    )
    attention = spec.submodules.self_attention.submodules
    if settings.softcap is None:
        attention.core_attention = PrefixDotProductAttention
    else:
        attention.core_attention = partial(SDPAttention, softcap=settings.softcap)
    if mlp == "experts":
        if settings.norms_after:
            raise ValueError(_NO_NORM)
        spec.module = ExpertsLayer
        spec.submodules.mlp.submodules.router = Router
    elif settings.norms_after:
        attention.linear_proj = spec.submodules.mlp.submodules.linear_fc2 = NormedTERowParallelLinear
    return _with_blocks(spec, has_attention, mlp)


def _with_local_rope(config: TransformerConfig, number: int, spec: ModuleSpec, settings: LayerSettings) -> ModuleSpec:
    """The layer `number`, counted from 0, with the frequencies of its window."""
    attention = spec.submodules.self_attention
    windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, number + 1)
    if windowed and settings.local_rope is not None and attention is not IdentityOp:
        attention.module = LocalRopeSelfAttention
        attention.params = {**attention.params, "local_rope": settings.local_rope}
    return spec


def _with_blocks(spec: ModuleSpec, has_attention: bool, mlp: MLPKind | None) -> ModuleSpec:
    """The layer with some of its blocks: the residual stream passes the others by, as in megatron-core's heterogeneous
    specs (models/gpt/heterogeneous/heterogeneous_layer_specs.py).
    """
    modules = spec.submodules
    if not has_attention:
        modules.input_layernorm, modules.self_attention, modules.self_attn_bda = IdentityOp, IdentityOp, IdentityFuncOp
    if mlp is None:
        modules.pre_mlp_layernorm, modules.mlp, modules.mlp_bda = IdentityOp, IdentityOp, IdentityFuncOp
    return spec


def block_spec(
    config: TransformerConfig,
    vp_stage: int | None = None,
    blocks: Sequence[tuple[bool, MLPKind | None]] | None = None,
    settings: LayerSettings = PLAIN,
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, or of one piece of it, and the final norm (a bare layer spec would bring
    Megatron's own norm back). `config.transformer_impl` chooses the implementation.

    Args:
        config: of the whole model.
        vp_stage: number of the piece; None without the interleaved schedule.
        blocks: for each layer of the whole model, whether it has attention, and which kind of MLP; None: all have
            attention and an MLP.
        settings: of all layers.
    """
    start = get_transformer_layer_offset(config, vp_stage)
    count = get_num_layers_to_build(config, vp_stage)
    kinds = blocks or [(True, "mlp")] * config.num_layers
    make: Callable[..., ModuleSpec] = layer_spec
    layer_norm: Any = RMSNorm
    if config.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        make, layer_norm = _te_layer_spec, TENorm
    specs = [
        _with_local_rope(config, number, make(config, *kinds[number], settings), settings)
        for number in range(start, start + count)
    ]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=layer_norm)
