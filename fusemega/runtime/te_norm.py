"""Transformer Engine's last product of a block with a norm after it. Importable where Transformer Engine is.

Shape suffixes: S sequence, B batch, F what the block has inside, H hidden.
"""

from __future__ import annotations

from typing import Any

from megatron.core.extensions.transformer_engine import TENorm, TERowParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor


class NormedTERowParallelLinear(TERowParallelLinear):
    """`specs.NormedRowParallelLinear` of Transformer Engine's modules."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.post_layernorm = TENorm(config, output_size, eps=config.layernorm_epsilon)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[S, B, F / TP] -> [S, B, H] ([S / TP, B, H] under sequence parallelism) and, as Megatron expects, no bias."""
        out, _ = super().forward(x)
        return self.post_layernorm(out), None
