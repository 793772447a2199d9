"""What the dense decoders have in common; a family is a subclass that says where it differs.

RMSNorm before attention and MLP, rotary positions, grouped-query attention, a gated SiLU MLP, no biases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from fusemega.errors import UserError
from fusemega.models.family import (
    LOCAL_NAMES,
    HFConfig,
    ParameterNames,
    check_keys,
    check_token_ids,
    require_int,
    require_number,
)
from fusemega.models.rope import inverse_frequencies, rope_parameters
from fusemega.models.rules import QKV, GateUp, Replicated, RowParallel, Rule, VocabRows

_KNOWN = frozenset(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    rms_norm_eps rope_theta rope_scaling rope_parameters tie_word_embeddings
    """.split()  # noqa: SIM905
)
_REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",), "attention_dropout": (0, None)}


class DenseDecoder:
    """A `Family` whose subclasses set what follows.

    Attributes:
        model_types: the values of `model_type` it answers for.
        known: keys it reads besides those of every dense decoder.
        required_values: keys with the values under which its mathematics hold.
        defaults: what transformers takes for a key that config.json leaves out; a null there stays a null.
        qkv_bias: whether query, key and value have a bias.
        qk_norm: whether queries and keys pass an RMSNorm over the head size before rotation.
    """

    model_types: tuple[str, ...]
    known: ClassVar[frozenset[str]] = frozenset()
    required_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    defaults: ClassVar[Mapping[str, Any]] = {}
    qkv_bias: ClassVar[bool] = False
    qk_norm: ClassVar[bool] = False

    def windows(self, hf_config: HFConfig) -> Sequence[int | None]:
        """Of each layer, how many tokens a query sees, itself included; None: all up to itself.

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
        tied = hf_config.get("tie_word_embeddings", False)
        if not isinstance(tied, bool):
            raise UserError(f"config.json: tie_word_embeddings = {tied!r}, expected true or false")
        heads, groups, head_dim = self._heads(hf_config)
        if heads % groups:
            raise UserError(
                f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}"
            )
        if head_dim % 2:
            raise UserError(f"config.json: head_dim {head_dim} is odd; rotary positions need pairs")
        with torch.device("cpu"):  # a model is also built where tensors have no contents
            frequencies = self.inv_freq(hf_config)
        if not (frequencies.isfinite() & (frequencies > 0)).all():
            raise UserError(
                f"config.json: the rotary positions of {rope_parameters(hf_config)} have frequencies that are no "
                "positive numbers of 32 bits"
            )
        self.windows(hf_config)

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
            "layernorm_epsilon": hf_config.get("rms_norm_eps", 1e-6),
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
        return inverse_frequencies(rope_parameters(hf_config), self._heads(hf_config)[2])

    def tied(self, hf_config: HFConfig) -> bool:
        """See `Family.tied`."""
        return bool(hf_config.get("tie_word_embeddings", False))

    def copies(self, hf_config: HFConfig) -> dict[str, str]:
        """See `Family.copies`."""
        return {"lm_head.weight": "model.embed_tokens.weight"} if self.tied(hf_config) else {}

    def ignorable(self, hf_name: str) -> bool:
        """Old folders may hold each layer's rotary frequencies, which the configuration decides."""
        return hf_name.endswith("rotary_emb.inv_freq")

    def rules(self, hf_config: HFConfig, names: ParameterNames = LOCAL_NAMES) -> list[Rule]:
        """See `Family.rules`."""
        hidden, vocab = hf_config["hidden_size"], hf_config["vocab_size"]
        embedding = "model.embed_tokens.weight"
        rules: list[Rule] = [VocabRows(names.embedding, embedding, (vocab, hidden))]
        for layer in range(hf_config["num_hidden_layers"]):
            rules += self._attention_rules(hf_config, layer, names)
            rules += self._other_layer_rules(hf_config, layer, names)
        rules.append(Replicated(names.final_norm, "model.norm.weight", (hidden,)))
        tied = self.tied(hf_config)
        rules.append(VocabRows(names.head, embedding if tied else "lm_head.weight", (vocab, hidden), is_duplicate=tied))
        return rules

    def _attention_rules(self, hf_config: HFConfig, layer: int, names: ParameterNames) -> list[Rule]:
        hidden = hf_config["hidden_size"]
        heads, groups, head_dim = self._heads(hf_config)
        hf = f"model.layers.{layer}.self_attn"

        def qkv(name: str, kind: str, columns: tuple[int, ...]) -> QKV:
            q, k, v = (f"{hf}.{part}_proj.{kind}" for part in "qkv")
            return QKV(name.format(layer), q, k, v, heads, groups, head_dim, columns)

        rules: list[Rule] = [qkv(names.qkv, "weight", (hidden,))]
        if self.qkv_bias:
            rules.append(qkv(names.qkv_bias, "bias", ()))
        rules.append(RowParallel(names.attention_out.format(layer), f"{hf}.o_proj.weight", (hidden, heads * head_dim)))
        if self.qk_norm:
            rules += [
                Replicated(names.q_norm.format(layer), f"{hf}.q_norm.weight", (head_dim,)),
                Replicated(names.k_norm.format(layer), f"{hf}.k_norm.weight", (head_dim,)),
            ]
        return rules

    def _other_layer_rules(self, hf_config: HFConfig, layer: int, names: ParameterNames) -> list[Rule]:
        hidden, ffn = hf_config["hidden_size"], hf_config["intermediate_size"]
        hf = f"model.layers.{layer}"
        mlp = f"{hf}.mlp"
        return [
            GateUp(names.mlp_in.format(layer), f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight", (ffn, hidden)),
            RowParallel(names.mlp_out.format(layer), f"{mlp}.down_proj.weight", (hidden, ffn)),
            Replicated(names.attention_norm.format(layer), f"{hf}.input_layernorm.weight", (hidden,)),
            Replicated(names.mlp_norm.format(layer), f"{hf}.post_attention_layernorm.weight", (hidden,)),
        ]

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
    """TransformerConfig's form: how many tokens *before* itself a query sees, and the layers where that holds."""
    sizes = {window for window in windows if window is not None}
    if not sizes:
        return {}
    (size,) = sizes
    settings: dict[str, Any] = {"window_size": (size - 1, 0)}
    if None in windows:
        settings["window_attn_skip_freq"] = [int(window is not None) for window in windows]
    return settings
