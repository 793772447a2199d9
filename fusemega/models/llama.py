"""The Llama family: Llama 1 to 3.2, and what shares its `model_type`: SmolLM2, SOLAR, Yi."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fusemega.errors import UserError
from fusemega.models.family import LOCAL_NAMES, HFConfig, ParameterNames, check_keys, require_int, require_number
from fusemega.models.rope import inverse_frequencies, rope_parameters
from fusemega.models.rules import QKV, GateUp, Row, Rule, Same, VocabRows

_KNOWN = frozenset(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    rms_norm_eps rope_theta rope_scaling rope_parameters tie_word_embeddings
    """.split()  # noqa: SIM905
)
_REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "rope_interleaved": (False,),
}


class Llama:
    """`model_type` llama: RMSNorm, rotary positions, grouped-query attention, gated SiLU MLP, no biases."""

    model_types: tuple[str, ...] = ("llama",)

    def check(self, hf_config: HFConfig) -> None:
        """See `Family.check`."""
        check_keys(hf_config, _KNOWN, _REQUIRED_VALUES)
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
            require_int(hf_config, key)
        require_int(hf_config, "max_position_embeddings", 2048)
        require_number(hf_config, "rms_norm_eps")
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
        rope_parameters(hf_config)

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
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
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
        """Llama 1 and 2 folders may hold each layer's rotary frequencies, which the configuration decides."""
        return hf_name.endswith("rotary_emb.inv_freq")

    def rules(self, hf_config: HFConfig, names: ParameterNames = LOCAL_NAMES) -> list[Rule]:
        """See `Family.rules`."""
        hidden, ffn, vocab = (hf_config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
        heads, groups, head_dim = self._heads(hf_config)
        embedding = "model.embed_tokens.weight"
        rules: list[Rule] = [VocabRows(names.embedding, embedding, (vocab, hidden))]
        for layer in range(hf_config["num_hidden_layers"]):
            hf = f"model.layers.{layer}"
            attention, mlp = f"{hf}.self_attn", f"{hf}.mlp"
            rules += [
                QKV(
                    names.qkv.format(layer),
                    q=f"{attention}.q_proj.weight",
                    k=f"{attention}.k_proj.weight",
                    v=f"{attention}.v_proj.weight",
                    heads=heads,
                    groups=groups,
                    head_dim=head_dim,
                    hidden=hidden,
                ),
                Row(names.attention_out.format(layer), f"{attention}.o_proj.weight", (hidden, heads * head_dim)),
                GateUp(names.mlp_in.format(layer), f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight", (ffn, hidden)),
                Row(names.mlp_out.format(layer), f"{mlp}.down_proj.weight", (hidden, ffn)),
                Same(names.attention_norm.format(layer), f"{hf}.input_layernorm.weight", (hidden,)),
                Same(names.mlp_norm.format(layer), f"{hf}.post_attention_layernorm.weight", (hidden,)),
            ]
        rules.append(Same(names.final_norm, "model.norm.weight", (hidden,)))
        tied = self.tied(hf_config)
        rules.append(VocabRows(names.head, embedding if tied else "lm_head.weight", (vocab, hidden), is_duplicate=tied))
        return rules

    def _heads(self, hf_config: HFConfig) -> tuple[int, int, int]:
        """(query heads, key/value groups, head size)."""
        heads = require_int(hf_config, "num_attention_heads")
        groups = require_int(hf_config, "num_key_value_heads", heads)
        if hf_config.get("head_dim") is None and require_int(hf_config, "hidden_size") % heads:
            raise UserError(
                f"config.json: hidden_size {hf_config['hidden_size']} is not a multiple of num_attention_heads "
                f"{heads}, and head_dim is not given"
            )
        return heads, groups, require_int(hf_config, "head_dim", hf_config["hidden_size"] // heads)
