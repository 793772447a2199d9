"""Llama, Mistral, Qwen2, Qwen3 and Gemma without some of their attention and MLP blocks, for transformers.

fusemega writes this file into folders of such models; transformers uses it with `trust_remote_code=True`. The key
`block_configs` of config.json says which blocks each layer has, one entry a layer: `{"attention": {"no_op": true},
"ffn": {}}` is a layer without attention. A layer without a block lacks its norms, too. All else is transformers' code.

The attention blocks that are left share the cache in order: the first has slot 0, whichever layer it is in. So a cache
has no slot that stays empty, and its length, which transformers reads in slot 0, is right without attention in layer 0.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import Gemma2Config, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3


class BlockConfig(dict[str, Any]):
    """An entry of `block_configs`, or one block of it: a mapping whose keys are attributes too, as servers read it."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class PrunedConfig:
    """What the configurations have in common."""

    block_configs: Any
    num_hidden_layers: int

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        entries = getattr(self, "block_configs", None)
        if entries is not None:
            self.block_configs = [
                BlockConfig({name: BlockConfig(block or {}) for name, block in entry.items()}) for entry in entries
            ]

    def has_block(self, layer: int, name: str) -> bool:
        """Whether a layer has its block "attention" or "ffn"."""
        entries = getattr(self, "block_configs", None)
        return not entries or not (entries[layer].get(name) or {}).get("no_op", False)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """With `decoder=True`, which is how caches are made, a configuration with a layer for each attention block."""
        if not decoder or encoder:
            return super().get_text_config(decoder=decoder, encoder=encoder)  # type: ignore[misc]
        layers = [layer for layer in range(self.num_hidden_layers) if self.has_block(layer, "attention")]
        slots = copy.copy(self)
        slots.num_hidden_layers = len(layers)
        slots.block_configs = None
        types = getattr(self, "layer_types", None)
        if types is not None:
            slots.layer_types = [types[layer] for layer in layers]  # type: ignore[attr-defined]
        return slots


class PrunedLayer:
    """A decoder layer that passes the residual stream by the blocks that it does not have."""

    norms: dict[str, tuple[str, ...]] = {"self_attn": ("input_layernorm",), "mlp": ("post_attention_layernorm",)}

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The layer's output, of the shape of its input."""
        layer: Any = self
        if layer.self_attn is not None:
            attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
            hidden_states = hidden_states + attended
        if layer.mlp is not None:
            hidden_states = hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))
        return hidden_states


class PrunedSandwichLayer:
    """The same where a norm follows each block, too, as in Gemma-2 and Gemma-3."""

    norms: dict[str, tuple[str, ...]] = {
        "self_attn": ("input_layernorm", "post_attention_layernorm"),
        "mlp": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    }

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The layer's output, of the shape of its input."""
        layer: Any = self
        if layer.self_attn is not None:
            attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
            hidden_states = hidden_states + layer.post_attention_layernorm(attended)
        if layer.mlp is not None:
            computed = layer.mlp(layer.pre_feedforward_layernorm(hidden_states))
            hidden_states = hidden_states + layer.post_feedforward_layernorm(computed)
        return hidden_states


class PrunedDecoder:
    """A language model of which the blocks that its configuration leaves out are taken away as soon as it is made."""

    config: Any
    model: Any
    layer_class: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        slot, bias = 0, getattr(config, "qkv_bias", None)
        for number, layer in enumerate(self.model.layers):
            layer.__class__ = self.layer_class
            if config.has_block(number, "attention"):
                layer.self_attn.layer_idx = slot
                slot += 1
                if bias is not None:  # of nemotron-nas: whether query, key and value have a bias; the output has none
                    for name in ("q_proj", "k_proj", "v_proj"):
                        old = getattr(layer.self_attn, name)
                        setattr(layer.self_attn, name, torch.nn.Linear(old.in_features, old.out_features, bias=bias))
            for block, name in (("self_attn", "attention"), ("mlp", "ffn")):
                if not config.has_block(number, name):
                    for module in (block, *self.layer_class.norms[block]):
                        setattr(layer, module, None)


class PrunedLlamaConfig(PrunedConfig, LlamaConfig):
    """A Llama's configuration with `block_configs`."""

    model_type = "pruned_llama"


class PrunedLlamaDecoderLayer(PrunedLayer, modeling_llama.LlamaDecoderLayer):
    """A Llama's layer without some blocks."""


class PrunedLlamaForCausalLM(PrunedDecoder, modeling_llama.LlamaForCausalLM):
    """A Llama without some blocks."""

    config_class = PrunedLlamaConfig
    layer_class = PrunedLlamaDecoderLayer
    _no_split_modules = ["PrunedLlamaDecoderLayer"]


class PrunedMistralConfig(PrunedConfig, MistralConfig):
    """A Mistral's configuration with `block_configs`."""

    model_type = "pruned_mistral"


class PrunedMistralDecoderLayer(PrunedLayer, modeling_mistral.MistralDecoderLayer):
    """A Mistral's layer without some blocks."""


class PrunedMistralForCausalLM(PrunedDecoder, modeling_mistral.MistralForCausalLM):
    """A Mistral without some blocks."""

    config_class = PrunedMistralConfig
    layer_class = PrunedMistralDecoderLayer
    _no_split_modules = ["PrunedMistralDecoderLayer"]


class PrunedQwen2Config(PrunedConfig, Qwen2Config):
    """A Qwen2's configuration with `block_configs`."""

    model_type = "pruned_qwen2"


class PrunedQwen2DecoderLayer(PrunedLayer, modeling_qwen2.Qwen2DecoderLayer):
    """A Qwen2's layer without some blocks."""


class PrunedQwen2ForCausalLM(PrunedDecoder, modeling_qwen2.Qwen2ForCausalLM):
    """A Qwen2 without some blocks."""

    config_class = PrunedQwen2Config
    layer_class = PrunedQwen2DecoderLayer
    _no_split_modules = ["PrunedQwen2DecoderLayer"]


class PrunedQwen3Config(PrunedConfig, Qwen3Config):
    """A Qwen3's configuration with `block_configs`."""

    model_type = "pruned_qwen3"


class PrunedQwen3DecoderLayer(PrunedLayer, modeling_qwen3.Qwen3DecoderLayer):
    """A Qwen3's layer without some blocks."""


class PrunedQwen3ForCausalLM(PrunedDecoder, modeling_qwen3.Qwen3ForCausalLM):
    """A Qwen3 without some blocks."""

    config_class = PrunedQwen3Config
    layer_class = PrunedQwen3DecoderLayer
    _no_split_modules = ["PrunedQwen3DecoderLayer"]


class PrunedGemma2Config(PrunedConfig, Gemma2Config):
    """A Gemma-2's configuration with `block_configs`."""

    model_type = "pruned_gemma2"


class PrunedGemma2DecoderLayer(PrunedSandwichLayer, modeling_gemma2.Gemma2DecoderLayer):
    """A Gemma-2's layer without some blocks."""


class PrunedGemma2ForCausalLM(PrunedDecoder, modeling_gemma2.Gemma2ForCausalLM):
    """A Gemma-2 without some blocks."""

    config_class = PrunedGemma2Config
    layer_class = PrunedGemma2DecoderLayer
    _no_split_modules = ["PrunedGemma2DecoderLayer"]


class PrunedGemma3TextConfig(PrunedConfig, Gemma3TextConfig):
    """The configuration of a Gemma-3's text model with `block_configs`."""

    model_type = "pruned_gemma3_text"


class PrunedGemma3TextDecoderLayer(PrunedSandwichLayer, modeling_gemma3.Gemma3DecoderLayer):
    """A layer of a Gemma-3's text model without some blocks."""


class PrunedGemma3TextForCausalLM(PrunedDecoder, modeling_gemma3.Gemma3ForCausalLM):
    """A Gemma-3's text model without some blocks."""

    config_class = PrunedGemma3TextConfig
    layer_class = PrunedGemma3TextDecoderLayer
    _no_split_modules = ["PrunedGemma3TextDecoderLayer"]


class DeciLMConfig(PrunedConfig, LlamaConfig):
    """A configuration of `model_type: nemotron-nas`, a Llama without some blocks."""

    model_type = "nemotron-nas"


class DeciLMForCausalLM(PrunedLlamaForCausalLM):
    """A model of `model_type: nemotron-nas`."""

    config_class = DeciLMConfig
