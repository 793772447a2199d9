"""Configurations of models of which blocks were removed, in the forms that others read.

A family without some blocks is a `model_type` of its own (`pruned_llama`), because transformers' class of the family
would fill the missing blocks at random. `modeling_pruned.py`, which travels with such a folder, has the classes;
fusemega itself never runs it, and reads `block_configs`.
"""

from __future__ import annotations

import copy
from typing import Any

from fusemega.errors import UserError
from fusemega.models.architecture import Architecture
from fusemega.models.family import HARMLESS_KEYS, PRUNED, Family
from fusemega.models.heads import class_name
from fusemega.models.left_out import block_configs_of, sized_block_configs
from fusemega.models.nemotron_nas import MODEL_TYPE as NEMOTRON_NAS
from fusemega.models.parts import Attention, Experts
from fusemega.models.rope import rope_parameters
from fusemega.models.travelling_code import auto_map

_TYPE, _CLASS = PRUNED, "Pruned"


def pruned(family: Family) -> Family:
    """The family under the `model_type` that stands for models of it without some blocks."""
    out = copy.copy(family)
    out.model_types = tuple(_TYPE + model_type for model_type in family.model_types)
    out.hf_class = _CLASS + family.hf_class
    out.auto_map = auto_map(out.hf_class)
    return out


def ordinary_config(architecture: Architecture) -> dict[str, Any]:
    """The configuration under the `model_type` of the ordinary family, from whichever form.

    `block_configs` says which blocks are left out, if any are. Only fusemega reads a configuration that has both.
    """
    config = {key: value for key, value in architecture.hf_config.items() if key != "block_configs"}
    model_type = str(config["model_type"])
    if model_type == NEMOTRON_NAS:
        sizes = architecture.transformer_config
        biased = bool(config.pop("qkv_bias", False))
        config["model_type"], hf_class = ("qwen2", "Qwen2") if biased else ("llama", "Llama")
        config["architectures"] = [class_name(hf_class, architecture.head)]
        config |= {"num_key_value_heads": sizes["num_query_groups"], "intermediate_size": sizes["ffn_hidden_size"]}
    elif model_type.startswith(_TYPE):
        config["model_type"] = model_type.removeprefix(_TYPE)
        hf_class = architecture.family.hf_class.removeprefix(_CLASS)
        config["architectures"] = [class_name(hf_class, architecture.head)]
    if not architecture.complete:
        config["block_configs"] = block_configs_of(architecture.layers)
    return config


def remote_code_config(architecture: Architecture) -> dict[str, Any]:
    """The configuration of the form `remote-code`.

    Args:
        architecture: of an ordinary configuration with `block_configs` (from `ordinary_config`).

    Raises:
        UserError: the model has no language model's head.
    """
    _require_vocabulary(architecture, "remote-code")
    if architecture.family.brings_code:
        raise UserError(
            f"config.json: the form remote-code has no class for model_type {architecture.hf_config['model_type']!r}; "
            "allowed: plain"
        )
    config, hf_class = architecture.hf_config, _CLASS + architecture.family.hf_class
    if any(isinstance(layer.mlp, Experts) for layer in architecture.layers):
        raise UserError(
            f"config.json: the form remote-code has no experts, which {config['model_type']} has; allowed: plain"
        )
    return {
        **config,
        "model_type": _TYPE + str(config["model_type"]),
        "architectures": [class_name(hf_class, architecture.head)],
    }


def nemotron_nas_config(architecture: Architecture) -> dict[str, Any]:
    """The configuration of the form `nemotron-nas`.

    Args:
        architecture: as for `remote_code_config`.

    Raises:
        UserError: the form has no place for a part of the model; readers would compute something else.
    """
    _require_vocabulary(architecture, "nemotron-nas")
    config, sizes = architecture.hf_config, architecture.transformer_config
    attentions = [layer.attention for layer in architecture.layers if layer.attention is not None]
    mlps = [layer.mlp for layer in architecture.layers if layer.mlp is not None]
    norms_of_blocks = [*(block.norms for block in attentions), *(block.norms for block in mlps)]
    lacks = {
        "experts": any(isinstance(mlp, Experts) for mlp in mlps),
        "weights in the form of this family": any(type(part) is not Attention for part in attentions),
        "norms on queries and keys": any(attention.qk_norm for attention in attentions),
        "second norm around a block": any(len(norms) != 1 for norms in norms_of_blocks),
        "sliding windows": "window_size" in sizes,
        "a softcap of the logits": architecture.softcap is not None,
        "rotary positions of the types yarn, dynamic and longrope": architecture.text_rope() is not None,
    }
    for part, present in lacks.items():
        if present:
            remote = not (lacks["experts"] or architecture.family.brings_code)
            raise UserError(
                f"config.json: the form nemotron-nas has no {part}, which this {config['model_type']} model has; "
                f"allowed: {'remote-code' if remote else 'plain'}"
            )
    rope = rope_parameters(config)
    theta = rope.pop("rope_theta")
    kept = {
        key: value
        for key, value in config.items()
        if key in HARMLESS_KEYS or key.endswith("_token_id") or key in ("vocab_size", "tie_word_embeddings")
    }
    out = kept | {
        "model_type": NEMOTRON_NAS,
        "architectures": ["DeciLMForCausalLM"],
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "hidden_size": sizes["hidden_size"],
        "intermediate_size": sizes["ffn_hidden_size"],
        "num_hidden_layers": sizes["num_layers"],
        "num_attention_heads": sizes["num_attention_heads"],
        "num_key_value_heads": sizes["num_query_groups"],
        "head_dim": sizes["kv_channels"],
        "rms_norm_eps": sizes["layernorm_epsilon"],
        "rope_theta": theta,
        "rope_scaling": None if rope == {"rope_type": "default"} else rope,
        "block_configs": sized_block_configs(architecture.layers),
    }
    return out | ({"qkv_bias": True} if sizes["add_qkv_bias"] else {})


def _require_vocabulary(architecture: Architecture, form: str) -> None:
    if architecture.head != "vocabulary":
        name = class_name(architecture.family.hf_class, architecture.head)
        raise UserError(f"config.json: the form {form} is for language models, and this is a {name}; allowed: plain")
