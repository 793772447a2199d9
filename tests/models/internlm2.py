"""InternLM2's tensors from a Llama's, written plainly: no class of transformers has its form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

_NAMES = {
    "model.embed_tokens": "model.tok_embeddings",
    "lm_head": "output",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
CODE = {
    "AutoConfig": "configuration_internlm2.InternLM2Config",
    "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
    "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
}


def as_internlm2(tensors: dict[str, torch.Tensor], heads: int, groups: int) -> dict[str, torch.Tensor]:
    """Llama's tensors (or their gradients) under InternLM2's names.

    `wqkv` has for each key/value head the query heads that use it, then the key head, then the value head.
    """
    out: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        if "q_proj" in name:
            q, k, v = (tensors[name.replace("q_proj", f"{kind}_proj")] for kind in "qkv")
            size = len(q) // heads
            rows = []
            for group in range(groups):
                for head in range(group * heads // groups, (group + 1) * heads // groups):
                    rows.append(q[head * size : (head + 1) * size])
                rows += [k[group * size : (group + 1) * size], v[group * size : (group + 1) * size]]
            out[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(rows)
        elif "k_proj" not in name and "v_proj" not in name:
            for theirs, ours in _NAMES.items():
                name = name.replace(theirs, ours)
            out[name] = value.clone()
    return out


def write_internlm2(folder: Path, model: LlamaForCausalLM, **config: Any) -> None:
    """A folder as published ones are, code named and not there, of the model that computes the same as `model`."""
    settings = model.config
    folder.mkdir(parents=True, exist_ok=True)
    tensors = as_internlm2(dict(model.state_dict()), settings.num_attention_heads, settings.num_key_value_heads)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps")
    own = {key: getattr(settings, key) for key in sizes}
    own |= {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "auto_map": CODE, "bias": False}
    own |= {"hidden_act": "silu", "attn_implementation": "eager", "torch_dtype": "float32", "pad_token_id": 2}
    (folder / "config.json").write_text(json.dumps(own | config))
