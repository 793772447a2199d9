"""Gemma-2 and Gemma-3's text models: what is refused; settings, windows and rotary positions against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForSequenceClassification,
    Gemma3TextConfig,
    Gemma3TextForSequenceClassification,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

from fusemega.convert.verify import transformers_logits
from fusemega.errors import UserError
from fusemega.hf.folder import HFFolder
from fusemega.hf.load import load_hf
from fusemega.models.build import build_model, init_random
from fusemega.models.dense_logits import dense_logits
from fusemega.models.family import FULL, SLIDING, keep_layers
from fusemega.models.registry import architecture_of
from fusemega.runtime.parallel import World
from tests.models.test_families import windows

TINY: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 8,
}
PUBLISHED_9B: dict[str, Any] = {  # of google/gemma-2-9b-it, with its old names
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "model_type": "gemma2",
    "query_pre_attn_scalar": 256,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "sliding_window_size": 4096,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "vocab_size": 256000,
}


@pytest.mark.parametrize(
    ("model_type", "change", "words"),
    [
        ("gemma2", {"hidden_activation": "gelu"}, ["hidden_activation = 'gelu'", "'gelu_pytorch_tanh'"]),
        ("gemma2", {"hidden_act": "silu"}, ["hidden_act = 'silu'"]),
        ("gemma2", {"use_bidirectional_attention": True}, ["use_bidirectional_attention = True"]),
        ("gemma2", {"attention_bias": True}, ["attention_bias = True"]),
        ("gemma2", {"attn_logit_softcapping": 0}, ["attn_logit_softcapping = 0", "positive number"]),
        ("gemma2", {"final_logit_softcapping": "30"}, ["final_logit_softcapping = '30'"]),
        ("gemma2", {"query_pre_attn_scalar": None}, ["query_pre_attn_scalar is missing"]),
        ("gemma2", {"sliding_window": None}, ["sliding_window is missing"]),
        ("gemma2", {"sliding_window_size": 9}, ["sliding_window_size = 9", "sliding_window = 8"]),
        ("gemma2", {"layer_types": [FULL] * 6}, ["layer_types", "a list of 7"]),
        ("gemma2", {"sliding_window_pattern": 3}, ["unknown key 'sliding_window_pattern'"]),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping = 50.0", "allowed: None"]),
        ("gemma3_text", {"sliding_window_pattern": 0}, ["sliding_window_pattern = 0"]),
        ("gemma3_text", {"_sliding_window_pattern": 6}, ["_sliding_window_pattern = 6 without layer_types"]),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, ["rope_parameters", "'rope_type'", SLIDING]),
        ("gemma3_text", {"rope_parameters": {FULL: 3}}, ["rope_parameters.full_attention = 3"]),
        ("gemma3_text", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["'yarn'", "linear, llama3"]),
        ("gemma3", {}, ["images and text", "gemma3_text"]),
        ("gemma", {}, ["'gemma'", "did you mean 'gemma2'"]),
        ("gemma3_text", {"architectures": ["Gemma3ForConditionalGeneration"]}, ["Gemma3ForCausalLM"]),
    ],
)
def test_refuses_what_it_would_compute_wrongly(model_type: str, change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        architecture_of(TINY | {"model_type": model_type} | change)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"layer_types": [FULL, SLIDING, SLIDING, FULL, FULL, SLIDING, FULL]},
        {"layer_types": [FULL] * 7},
        {"final_logit_softcapping": None},
        {"tie_word_embeddings": False},
        {"sliding_window_pattern": 3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 5e5},
    ],
    ids=str,
)
def test_settings_are_those_of_transformers(model_type: str, change: dict[str, Any]) -> None:
    if model_type == "gemma2" and "sliding_window_pattern" in change:
        change = {}
    config = TINY | {"model_type": model_type} | change
    opened = architecture_of(config)
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert windows(config) == [hf.config.sliding_window if kind == SLIDING else None for kind in hf.config.layer_types]
    rules = [rule for rule in opened.rules() if not rule.duplicate]
    wanted = {name: tuple(parameter.shape) for name, parameter in hf.named_parameters()}
    assert {name: shape for rule in rules for name, shape in rule.hf_shapes().items()} == wanted
    layer = hf.model.layers[0].self_attn
    assert opened.tied == hf.config.tie_word_embeddings
    assert opened.softcap == hf.config.final_logit_softcapping
    assert opened.attention_softcap == layer.attn_logit_softcapping
    assert opened.transformer_config["softmax_scale"] == layer.scaling
    assert opened.embedding_scale == hf.model.embed_tokens.scalar_embed_scale
    if model_type == "gemma3_text":
        rope = Gemma3RotaryEmbedding(hf.config)
        assert torch.equal(opened.inv_freq(), rope.full_attention_inv_freq)
        local = opened.local_inv_freq()
        assert SLIDING not in hf.config.layer_types or (
            local is not None and torch.equal(local, rope.sliding_attention_inv_freq)
        )
    else:
        assert opened.local_inv_freq() is None


@pytest.mark.parametrize(
    ("model_type", "kept"), [("gemma2", [1, 2, 3, 6]), ("gemma3_text", [0, 5, 6]), ("pruned_gemma2", [1, 3])]
)
def test_layers_that_are_kept_keep_their_windows_without_layer_types(model_type: str, kept: list[int]) -> None:
    config = TINY | {"model_type": model_type}
    before = windows(config)
    assert windows(keep_layers(config, kept)) == [before[layer] for layer in kept]
    assert "layer_types" not in config


def test_a_published_configuration_of_gemma_2() -> None:
    opened = architecture_of(PUBLISHED_9B)
    assert sum(torch.Size(shape).numel() for shape in opened.hf_shapes().values()) == 9_241_705_984
    assert windows(PUBLISHED_9B) == [4096, None] * 21
    assert opened.norms_after and opened.tied and opened.embedding_scale == 3584**0.5


def test_random_weights_begin_as_transformers_does(world: World) -> None:
    model = build_model(architecture_of(TINY | {"model_type": "gemma2"}), world, torch.float32)
    init_random(model, world, 0)
    norms = [parameter for name, parameter in model.named_parameters() if "norm" in name]
    assert len(norms) == 4 * 7 + 1 and all(not parameter.any() for parameter in norms)


def test_embeddings_are_scaled_by_what_bf16_can_hold(world: World) -> None:
    model = build_model(architecture_of(TINY | {"model_type": "gemma2", "hidden_size": 48}), world, torch.bfloat16)
    init_random(model, world, 0)
    embedding = model.chunks[0].embedding
    ids = torch.arange(4)[None]
    scale = torch.tensor(48**0.5).bfloat16()  # 6.9375; 6.9282 else
    assert torch.equal(embedding(ids, ids)[:, 0], embedding.word_embeddings.weight[:4] * scale)


@pytest.mark.parametrize(
    ("config", "model"),
    [(Gemma2Config, Gemma2ForSequenceClassification), (Gemma3TextConfig, Gemma3TextForSequenceClassification)],
)
def test_a_score_in_the_heads_place(config: Any, model: Any, world: World, tmp_path: Path) -> None:
    model(config(**TINY, num_labels=1, pad_token_id=0)).save_pretrained(tmp_path)
    opened = HFFolder(tmp_path).architecture
    assert opened.head == "scalar" and not opened.tied
    ours = build_model(opened, world, torch.float32)
    load_hf(ours, tmp_path, world)
    found = dense_logits(ours, world, [[2, 7, 1, 5]])
    wanted = transformers_logits(tmp_path, [2, 7, 1, 5], opened)
    assert found is not None and wanted.abs().max() > 1e-3
    torch.testing.assert_close(found[-1:], wanted, atol=1e-5, rtol=0)
