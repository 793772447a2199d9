"""Gemma-2 and the text models of Gemma-3.

What is theirs alone: a norm before and after each block, norms that scale by 1 + weight, embeddings scaled by sqrt(H),
windows in turns, a scale of attention's scores that the configuration gives, and GELU by its tanh formula in the gate.
Gemma-2 caps the scores of attention and the logits. Gemma-3 has norms on queries and keys, and its layers with a window
have rotary positions of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from fusemega.errors import UserError, choose
from fusemega.models.dense import DenseDecoder
from fusemega.models.family import FULL, SLIDING, HFConfig, layer_types, require_int, require_number
from fusemega.models.parts import Norm
from fusemega.models.rope import rope_parameters
from fusemega.runtime.cpu_ops import gelu_tanh

_GELU = "gelu_pytorch_tanh"
_LARGEST = 1e9
_TWO_ROPES = ("default", "linear", "llama3")  # what the others have besides frequencies holds for all layers


class Gemma2(DenseDecoder):
    """`model_type` gemma2: every second layer, from the first, has a window, unless `layer_types` say otherwise."""

    model_types: tuple[str, ...] = ("gemma2",)
    hf_class = "Gemma2"
    known = frozenset(
        """
        layer_types sliding_window sliding_window_size query_pre_attn_scalar attn_logit_softcapping
        final_logit_softcapping cache_implementation
        """.split()  # noqa: SIM905
    )
    required_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "hidden_activation": (_GELU,),
        "hidden_act": (_GELU,),  # beside hidden_activation, which decides
        "attention_bias": (False,),
        "use_bidirectional_attention": (False, None),
    }
    defaults: ClassVar[Mapping[str, Any]] = {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }

    def check(self, hf_config: HFConfig) -> None:
        """See `Family.check`."""
        super().check(hf_config)
        filled = {**self.defaults, **hf_config}
        require_int(filled, "head_dim")
        if filled["query_pre_attn_scalar"] is None:
            raise UserError("config.json: query_pre_attn_scalar is missing")
        for key in ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"):
            require_number(filled, key, below=_LARGEST)
        # An old name that no code reads; in published folders it repeats sliding_window.
        old = hf_config.get("sliding_window_size")
        if old is not None and old != filled["sliding_window"]:
            raise UserError(
                f"config.json: sliding_window_size = {old!r} and sliding_window = {filled['sliding_window']!r} differ; "
                "remove the former, which transformers does not read"
            )

    def windows(self, hf_config: HFConfig) -> Sequence[int | None]:
        """See `DenseDecoder.windows`."""
        types = layer_types({"model_type": self.model_types[0], **hf_config})
        assert types is not None
        if SLIDING not in types:
            return [None] * len(types)
        window = require_int({**self.defaults, **hf_config}, "sliding_window")
        return [window if kind == SLIDING else None for kind in types]

    def transformer_config(self, hf_config: HFConfig) -> dict[str, Any]:
        """See `Family.transformer_config`."""
        scalar = {**self.defaults, **hf_config}["query_pre_attn_scalar"]
        return super().transformer_config(hf_config) | {
            "activation_func": gelu_tanh,
            "layernorm_zero_centered_gamma": True,
            "softmax_scale": scalar**-0.5,
        }

    def norms(self, hidden: int) -> tuple[tuple[Norm, ...], tuple[Norm, ...]]:
        """See `DenseDecoder.norms`."""
        (before_attention,), (before_mlp,) = super().norms(hidden)
        after_attention = Norm("post_attention_layernorm", "self_attention.linear_proj.post_layernorm", None, hidden)
        before_mlp = Norm("pre_feedforward_layernorm", before_mlp.local, before_mlp.fused, hidden)
        after_mlp = Norm("post_feedforward_layernorm", "mlp.linear_fc2.post_layernorm", None, hidden)
        return (before_attention, after_attention), (before_mlp, after_mlp)

    def softcap(self, hf_config: HFConfig) -> float | None:
        """See `Family.softcap`."""
        return _number({**self.defaults, **hf_config}["final_logit_softcapping"])

    def attention_softcap(self, hf_config: HFConfig) -> float | None:
        """See `Family.attention_softcap`."""
        return _number({**self.defaults, **hf_config}["attn_logit_softcapping"])

    def embedding_scale(self, hf_config: HFConfig) -> float | None:
        """See `Family.embedding_scale`."""
        return math.sqrt(hf_config["hidden_size"])


class Gemma3Text(Gemma2):
    """`model_type` gemma3_text: windows in five layers of six, with a rope of their own; no cap unless it is given."""

    model_types: tuple[str, ...] = ("gemma3_text",)
    hf_class = "Gemma3Text"
    known = Gemma2.known | {"sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq"}
    # transformers' Gemma-3 has the key and never uses it.
    required_values = {**Gemma2.required_values, "attn_logit_softcapping": (None,)}
    defaults = {**Gemma2.defaults, "attn_logit_softcapping": None, "final_logit_softcapping": None}
    qk_norm = True

    def check(self, hf_config: HFConfig) -> None:
        """See `Family.check`."""
        super().check(hf_config)
        pattern = hf_config.get("_sliding_window_pattern")
        if pattern is not None and hf_config.get("layer_types") is None:
            raise UserError(
                f"config.json: _sliding_window_pattern = {pattern!r} without layer_types: transformers does not read "
                "it; write sliding_window_pattern or layer_types"
            )

    def rope(self, hf_config: HFConfig, *, local: bool = False) -> dict[str, Any]:
        """See `DenseDecoder.rope`. `rope_scaling` is for the layers that see the whole text."""
        given = hf_config.get("rope_parameters")
        given = {} if given is None else given
        if not isinstance(given, Mapping):
            raise UserError(f"config.json: rope_parameters = {given!r}, expected a mapping")
        for name in given:
            choose("config.json: rope_parameters", str(name), (FULL, SLIDING))
        kind, key, theta = (SLIDING, "rope_local_base_freq", 1e4) if local else (FULL, "rope_theta", 1e6)
        own = given.get(kind) or {}
        if not isinstance(own, Mapping):
            raise UserError(f"config.json: rope_parameters.{kind} = {own!r}, expected a mapping")
        scaling = {} if local else hf_config.get("rope_scaling") or {}
        if not isinstance(scaling, Mapping):
            raise UserError(f"config.json: rope_scaling = {scaling!r}, expected a mapping")
        found = hf_config.get(key)
        flat = {"rope_parameters": {**own, **scaling}, "rope_theta": theta if found is None else found}
        flat["max_position_embeddings"] = hf_config.get("max_position_embeddings", 131_072)
        out = rope_parameters(flat)
        if out["rope_type"] not in _TWO_ROPES:
            raise UserError(
                f"config.json: rope_type {out['rope_type']!r} of the {kind} layers: not supported where layers differ "
                f"in their rotary positions; allowed: {', '.join(_TWO_ROPES)}"
            )
        return out

    def longest_text(self, hf_config: HFConfig) -> int:
        """See `Family.longest_text`. Published configurations give the length with scaling."""
        return int(hf_config.get("max_position_embeddings") or 131_072)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
