"""The dense Qwen families: Qwen1.5, Qwen2, Qwen2.5 (`qwen2`) and Qwen3 (`qwen3`)."""

from __future__ import annotations

from collections.abc import Sequence

from fusemega.errors import UserError
from fusemega.models.dense import DenseDecoder
from fusemega.models.family import SLIDING, HFConfig, layer_types, require_int


class Qwen2(DenseDecoder):
    """`model_type` qwen2: a bias on query, key and value; some layers may have a sliding window."""

    model_types: tuple[str, ...] = ("qwen2",)
    hf_class = "Qwen2"
    known = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})
    required_values = {"use_mrope": (False,)}
    defaults = {"num_key_value_heads": 32, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
    qkv_bias = True

    def windows(self, hf_config: HFConfig) -> Sequence[int | None]:
        """See `DenseDecoder.windows`. `layer_types` decides; else layers from `max_window_layers` on have it."""
        hf_config = {**self.defaults, **hf_config}
        layers = require_int(hf_config, "num_hidden_layers")
        used = hf_config["use_sliding_window"]
        if not isinstance(used, bool):
            raise UserError(f"config.json: use_sliding_window = {used!r}, expected true or false")
        window = None
        if used and hf_config["sliding_window"] is not None:
            window = require_int(hf_config, "sliding_window")
        types = layer_types(hf_config)
        if types is None:
            full = layers if window is None else require_int(hf_config, "max_window_layers", minimum=0)
            return [None if layer < full else window for layer in range(layers)]
        if window is None and SLIDING in types:
            raise UserError(
                f"config.json: layer_types asks for {SLIDING}, and use_sliding_window = {used!r} with sliding_window "
                f"= {hf_config['sliding_window']!r} gives no window"
            )
        return [window if kind == SLIDING else None for kind in types]


class Qwen3(Qwen2):
    """`model_type` qwen3: as qwen2, with norms on queries and keys in place of the bias, and a head size of its own."""

    model_types: tuple[str, ...] = ("qwen3",)
    hf_class = "Qwen3"
    required_values = {"attention_bias": (False,)}
    defaults = {**Qwen2.defaults, "head_dim": 128}
    qkv_bias = False
    qk_norm = True

    def check(self, hf_config: HFConfig) -> None:
        """See `Family.check`."""
        super().check(hf_config)
        sizes = {**self.defaults, **hf_config}
        if "head_dim" in sizes:  # a null is no head size to transformers either
            require_int(sizes, "head_dim")
