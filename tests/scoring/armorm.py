"""A tiny model of ArmoRM's architecture, and its form written out plainly, to compare with.

Shape suffixes: L tokens of a text, H hidden size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

SPECIALS = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "[PAD]"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}"
    "<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
GATING = {"gating_hidden_dim": 12, "gating_n_hidden": 2, "gating_temperature": 2}
OBJECTIVES = 19


def write_armorm(folder: Path, chat: Path) -> Path:
    """The folder as it is published, but for its Python file: random weights under the real names."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=401, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*chat.read_text(encoding="utf-8").splitlines(), "assistant\n\n" * 40], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIALS[0], eos_token=SPECIALS[1], pad_token=SPECIALS[4]
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(11)
    config = LlamaConfig(vocab_size=401, pad_token_id=4, bos_token_id=0, eos_token_id=1, **SIZES)
    weights = {f"model.{name}": value for name, value in LlamaModel(config).state_dict().items()}
    hidden, wide = SIZES["hidden_size"], GATING["gating_hidden_dim"]
    weights["regression_layer.weight"] = torch.randn(OBJECTIVES, hidden)
    weights["reward_transform_matrix"] = torch.eye(OBJECTIVES) + 0.3 * torch.randn(OBJECTIVES, OBJECTIVES)
    for number, (outside, inside) in enumerate([(wide, hidden), (wide, wide), (OBJECTIVES, wide)]):
        weights[f"gating.layers.{number}.weight"] = torch.randn(outside, inside) / 2
        weights[f"gating.layers.{number}.bias"] = torch.randn(outside)
    weights["gating.logit_scale"] = torch.tensor([1.25])
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    own = {
        "architectures": ["LlamaForRewardModelWithGating"],
        "auto_map": {"AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModelWithGating"},
    }
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), **GATING, **own}))
    return folder


def plain_scores(folder: Path, ids: list[int], header: list[int]) -> tuple[float, list[float]]:
    """(score, the objectives) of one text in float64, from the formulas."""
    weights = {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}
    settings = json.loads((folder / "config.json").read_text())
    body = LlamaModel(LlamaConfig(**{key: settings[key] for key in (*SIZES, "vocab_size", "pad_token_id")})).double()
    body.load_state_dict({n.removeprefix("model."): w for n, w in weights.items() if n.startswith("model.")})
    with torch.no_grad():
        hidden_LH: Tensor = body(torch.tensor([ids])).last_hidden_state[0]
    places = [i for i in range(len(ids)) if ids[i : i + len(header)] == header]
    x = hidden_LH[places[-1]]
    for number in range(GATING["gating_n_hidden"] + 1):
        x = weights[f"gating.layers.{number}.weight"] @ x + weights[f"gating.layers.{number}.bias"]
        if number < GATING["gating_n_hidden"]:
            x = x.clamp(min=0)
    x = (x / GATING["gating_temperature"]).exp()
    shares = x / x.sum() * weights["gating.logit_scale"][0]
    objectives = weights["regression_layer.weight"] @ hidden_LH[-1]
    score = 0.0
    for i in range(OBJECTIVES):
        score += float(shares[i] * (objectives @ weights["reward_transform_matrix"][:, i]))
    return score, objectives.tolist()
