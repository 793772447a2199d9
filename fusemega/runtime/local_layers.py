"""Modules of a layer that need neither Transformer Engine nor apex, where megatron-core's do not fit.

Shape suffixes: S sequence, B batch, T tokens of an expert, D head size, F feed-forward, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings import RotaryEmbedding
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP, MLPSubmodules

from fusemega.runtime.cpu_ops import geglu, gelu_tanh, rms_norm, swiglu


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, marked so that Megatron sums its gradient over sequence-parallel ranks.

    megatron-core's own WrappedTorchNorm refuses sequence parallelism (transformer/torch_norm.py:32). With
    `layernorm_zero_centered_gamma` the scale is 1 + weight, and half precision is rounded once, at the end.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._zero_centered = config.layernorm_zero_centered_gamma

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Over the last dimension, of the same shape and dtype."""
        wide = torch.promote_types(x.dtype, torch.float32)
        scale = 1.0 + self.weight.to(wide) if self._zero_centered else self.weight
        if x.is_cpu and x.dtype == wide:  # `rms_norm` takes fp32 and float64
            assert self.eps is not None
            return rms_norm(x, scale, self.eps)
        if self._zero_centered:
            return (F.rms_norm(x.to(wide), self.normalized_shape, None, self.eps) * scale).to(x.dtype)
        return super().forward(x)


class NormedRowParallelLinear(RowParallelLinear):
    """The last product of a block, and the norm of its sum over ranks, before it is added to the stream."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.post_layernorm = RMSNorm(config, output_size, eps=config.layernorm_epsilon)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, None]:
        """[S, B, F / TP] -> [S, B, H] ([S / TP, B, H] under sequence parallelism) and, as Megatron expects, no bias."""
        out, _ = super().forward(input_)
        return self.post_layernorm(out), None


class LocalRopeSelfAttention(SelfAttention):
    """Self-attention with rotary frequencies of its own in the place of the model's, as Gemma-3's windowed layers have.

    Args:
        local_rope: gives them for a length; shared by these layers.
    """

    def __init__(self, *args: Any, local_rope: RotaryEmbedding, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._local_rope = (local_rope,)  # in a tuple, so that it is no submodule of each layer

    def forward(self, *args: Any, rotary_pos_emb: torch.Tensor, **kwargs: Any) -> Any:
        """As Megatron's; of `rotary_pos_emb` [S, 1, 1, D] the length is used."""
        own = self._local_rope[0](len(rotary_pos_emb), packed_seq=True)
        return super().forward(*args, rotary_pos_emb=own, **kwargs)


class LocalMLP(MLP):
    """megatron-core's MLP of megatron-core's own linear layers."""

    last_product: type[RowParallelLinear] = RowParallelLinear

    def __init__(self, config: TransformerConfig, **kwargs: Any) -> None:
        modules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=self.last_product)
        super().__init__(config, modules, **kwargs)


class GatedCPUMLP(LocalMLP):
    """The same without biases, with one operation between its products: SwiGLU, or GeGLU by tanh."""

    def __init__(self, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self._unit = geglu if config.activation_func is gelu_tanh else swiglu

    def forward(
        self, hidden_states: torch.Tensor, per_token_scale: torch.Tensor | None = None, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """[S, B, H] -> [S, B, H] and, as Megatron expects, no bias. Of an expert, [T, H] and a factor for each [T]."""
        gate_up, _ = self.linear_fc1(hidden_states)
        inner = self._unit(gate_up)
        if per_token_scale is not None:
            inner = (inner * per_token_scale[:, None]).to(inner.dtype)
        out, _ = self.linear_fc2(inner)
        return out, None


class NormedGatedCPUMLP(GatedCPUMLP):
    """The same with a norm at its end."""

    last_product = NormedRowParallelLinear
