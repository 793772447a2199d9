"""Random models of every family, whole and with blocks masked in place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.dynamic_module_utils as modules
from transformers import AutoConfig, AutoModelForCausalLM

from fusemega.prune.order import Order, ResidualBlock, Step, type_of
from tests.prune.search_fixtures import make_run, work  # noqa: F401  (fixtures)

FULL, WINDOWED = "full_attention", "sliding_attention"
LAYERS = 5
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 4},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": [FULL, WINDOWED, WINDOWED, FULL, WINDOWED],
    },
    "qwen3": {},
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 7, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": 4, "query_pre_attn_scalar": 7, "sliding_window_pattern": 2},
}
WITH_EXPERTS: dict[str, dict[str, Any]] = {  # which are written as plain alone
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0, 2]},
}
SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def save_model(folder: Path, model_type: str = "llama", **settings: Any) -> Path:
    """A random model in `folder`, whose blocks all matter."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES | (FAMILIES | WITH_EXPERTS)[model_type] | settings)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and "gemma" not in model_type else 0.0, 0.2)
    model.save_pretrained(folder)
    return folder


def masked(folder: Path, removed: Sequence[ResidualBlock]) -> Any:
    """transformers' whole model in fp32, with the residual stream led past blocks."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for block in removed:
        layer = model.model.layers[block.layer]
        if hasattr(layer, "pre_feedforward_layernorm"):  # then a norm follows the block
            (
                layer.post_attention_layernorm if block.kind == "mha" else layer.post_feedforward_layernorm
            ).forward = torch.zeros_like
        elif block.kind == "mha":
            layer.self_attn.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
        else:
            layer.mlp.forward = torch.zeros_like
    return model


def blocks(words: str) -> list[ResidualBlock]:
    """ "mha 0, mlp 2" as blocks."""
    return [ResidualBlock(*(int(w) if w.isdigit() else w for w in pair.split())) for pair in words.split(", ")]  # type: ignore[arg-type]


def order_of(words: str) -> Order:
    """An order that removes these blocks and names no model."""
    return Order(tuple(Step(block) for block in blocks(words)), type_of(blocks(words)))


@pytest.fixture(autouse=True)
def own_modules(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Code of folders is copied below the test's own folder."""
    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
