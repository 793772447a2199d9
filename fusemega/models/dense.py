"""What the dense decoders have in common; a family is a subclass that says where it differs.

RMSNorm before attention and MLP, rotary positions, grouped-query attention, a gated SiLU MLP, no biases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from fusemega.errors import UserError
from fusemega.models.family import HFConfig, ModelNames, check_keys, check_token_ids, require_int, require_number
from fusemega.models.parts import Attention, GatedMLP, Layer, Norm
from fusemega.models.rope import inverse_frequencies, longest_text, rope_parameters, text_rope
from fusemega.runtime.text_rope import TextRope

_KNOWN = frozenset(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    rms_norm_eps rope_theta rope_scaling rope_parameters tie_word_embeddings block_configs
    """.split()  # noqa: SIM905
)
_REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",), "attention_dropout": (0, None)}


class DenseDecoder:
    """A `Family`, of which subclasses set the attributes below.

    Attributes:
        model_types, hf_class, auto_map, brings_code, names: see `Family`.
        known: keys that the family reads besides those of every dense decoder.
        required_values: for some keys, the only values for which its mathematics is right.
        defaults: transformers' defaults of keys that config.json leaves out; a null in config.json stays a null.
        qkv_bias: whether query, key and value have a bias.
        qk_norm: whether queries and keys pass an RMSNorm over the head size before rotation.
        attention_part, mlp_part: the blocks of a layer, with Hugging Face's names and form of their weights.
    """

    model_types: tuple[str, ...]
    hf_class: str
    auto_map: Mapping[str, str] = MappingProxyType({})
    brings_code: bool = False
    names: ModelNames = ModelNames()
    known: ClassVar[frozenset[str]] = frozenset()
    required_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    defaults: ClassVar[Mapping[str, Any]] = {}
    qkv_bias: ClassVar[bool] = False
    qk_norm: ClassVar[bool] = False
    attention_part: ClassVar[type[Attention]] = Attention
    mlp_part: ClassVar[type[GatedMLP]] = GatedMLP

    def windows(self, hf_config: HFConfig) -> Sequence[int | None]:
        """For each layer, how many tokens a query sees, its own included; None: all up to its own.

        Raises:
            UserError: the keys that say so are malformed or contradict each other.
        """
        return [None] * require_int(hf_config, "num_hidden_layers")

    def check(self, hf_config: HFConfig) -> None:
        """See `Family.check`."""
        check_keys(hf_config, _KNOWN | self.known, {**_REQUIRED_VALUES, **self.required_values})
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
            require_int(hf_config, key)
        require_int(hf_config, "max_position_embeddings", 2048)
        require_number(hf_config, "rms_norm_eps", below=1.0)
        check_token_ids(hf_config)
        tied = {**self.defaults, **hf_config}.get("tie_word_embeddings", False)
        if not isinstance(tied, bool):
            raise UserError(f"config.json: tie_word_embeddings = {tied!r}, expected true or false")
        heads, groups, head_dim = self._heads(hf_config)
        if heads % groups:
            raise UserError(
                f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}"
            )
        if head_dim % 2:
            raise UserError(f"config.json: head_dim {head_dim} is odd; rotary positions need pairs")
        for local in (False, True):
            parameters = self.rope(hf_config, local=local)
            with torch.device("cpu"):  # a model is also built on the device "meta", where tensors have no values
                frequencies = inverse_frequencies(parameters, head_dim)
            if not (frequencies.isfinite() & (frequencies > 0)).all():
                raise UserError(
                    f"config.json: the rotary positions of {parameters} have frequencies that are no positive numbers "
                    "of 32 bits"
                )
        self.text_rope(hf_config)  # for its errors
        self.windows(hf_config)

    def rope(self, hf_config: HFConfig, *, local: bool = False) -> dict[str, Any]:
        """Rope settings as `rope_parameters` gives them; `local`: of the layers with a sliding window."""
        return rope_parameters(hf_config)

    def transformer_config(self, hf_config: HFConfig) -> dict[str, Any]:
        """See `Family.transformer_config`."""
        heads, groups, head_dim = self._heads(hf_config)
        return {
            "num_layers": hf_config["num_hidden_layers"],
            "hidden_size": hf_config["hidden_size"],
            "ffn_hidden_size": hf_config["intermediate_size"],
            "num_attention_heads": heads,
            "num_query_groups": groups,
            "kv_channels": head_dim,
            "normalization": "RMSNorm",
            "layernorm_epsilon": hf_config.get("rms_norm_eps", self.defaults.get("rms_norm_eps", 1e-6)),
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "add_bias_linear": False,
            "add_qkv_bias": self.qkv_bias,
            "qk_layernorm": self.qk_norm,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            **_window_settings(self.windows(hf_config)),
        }

    def inv_freq(self, hf_config: HFConfig) -> torch.Tensor:
        """See `Family.inv_freq`."""
        return inverse_frequencies(self.rope(hf_config), self._heads(hf_config)[2])

    def text_rope(self, hf_config: HFConfig) -> TextRope | None:
        """See `Family.text_rope`."""
        return text_rope(self.rope(hf_config), self._heads(hf_config)[2])

    def local_inv_freq(self, hf_config: HFConfig) -> torch.Tensor | None:
        """See `Family.local_inv_freq`."""
        local = self.rope(hf_config, local=True)
        return None if local == self.rope(hf_config) else inverse_frequencies(local, self._heads(hf_config)[2])

    def longest_text(self, hf_config: HFConfig) -> int:
        """See `Family.longest_text`."""
        return longest_text(hf_config)

    def tied(self, hf_config: HFConfig) -> bool:
        """See `Family.tied`."""
        return bool({**self.defaults, **hf_config}.get("tie_word_embeddings", False))

    def softcap(self, hf_config: HFConfig) -> float | None:
        """See `Family.softcap`."""
        return None

    def attention_softcap(self, hf_config: HFConfig) -> float | None:
        """See `Family.attention_softcap`."""
        return None

    def embedding_scale(self, hf_config: HFConfig) -> float | None:
        """See `Family.embedding_scale`."""
        return None

    def balancing(self, hf_config: HFConfig) -> float:
        """See `Family.balancing`."""
        return 0.0

    def ignorable(self, hf_name: str) -> bool:
        """Old folders may hold each layer's rotary frequencies, which the configuration decides."""
        return hf_name.endswith("rotary_emb.inv_freq")

    def layers(self, hf_config: HFConfig) -> Sequence[Layer]:
        """See `Family.layers`."""
        hidden = hf_config["hidden_size"]
        heads, groups, head_dim = self._heads(hf_config)
        attention_norms, mlp_norms = self.norms(hidden)
        layer = Layer(
            self.attention_part(hidden, heads, groups, head_dim, self.qkv_bias, self.qk_norm, attention_norms),
            self.mlp_part(hidden, hf_config["intermediate_size"], mlp_norms),
        )
        return [layer] * int(hf_config["num_hidden_layers"])

    def norms(self, hidden: int) -> tuple[tuple[Norm, ...], tuple[Norm, ...]]:
        """The norms of an attention block, and of an MLP block."""
        before_attention = Norm("input_layernorm", "input_layernorm", "self_attention.linear_qkv", hidden)
        before_mlp = Norm("post_attention_layernorm", "pre_mlp_layernorm", "mlp.linear_fc1", hidden)
        return (before_attention,), (before_mlp,)

    def _heads(self, hf_config: HFConfig) -> tuple[int, int, int]:
        """(query heads, key/value groups, head size)."""
        hf_config = {**self.defaults, **hf_config}
        heads = require_int(hf_config, "num_attention_heads")
        groups = require_int(hf_config, "num_key_value_heads", heads)
        if hf_config.get("head_dim") is None and require_int(hf_config, "hidden_size") % heads:
            raise UserError(
                f"config.json: hidden_size {hf_config['hidden_size']} is not a multiple of num_attention_heads "
                f"{heads}, and head_dim is not given"
            )
        return heads, groups, require_int(hf_config, "head_dim", hf_config["hidden_size"] // heads)


def _window_settings(windows: Sequence[int | None]) -> dict[str, Any]:
    """The windows as TransformerConfig has them: tokens *before* the query's own, and which layers have a window."""
    sizes = {window for window in windows if window is not None}
    if not sizes:
        return {}
    (size,) = sizes
    settings: dict[str, Any] = {"window_size": (size - 1, 0)}
    if None in windows:
        settings["window_attn_skip_freq"] = [int(window is not None) for window in windows]
    return settings
