"""Mistral, Qwen2 and Qwen3: what each refuses and accepts, and its settings, rules and windows against transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

from fusemega.errors import UserError
from fusemega.models.family import HFConfig, keep_layers
from fusemega.models.registry import architecture_of
from tests.models.published import PARAMETERS, PUBLISHED

TINY: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 8}
FULL, WINDOWED = "full_attention", "sliding_attention"


def windows(config: HFConfig) -> list[int | None]:
    """As Megatron is told: tokens a query of each layer sees, itself included."""
    settings = architecture_of(config).transformer_config
    before = settings.get("window_size")
    applies = settings.get("window_attn_skip_freq", [1] * settings["num_layers"])
    return [before[0] + 1 if before and here else None for here in applies]


@pytest.mark.parametrize(
    ("model_type", "change", "words"),
    [
        ("mistral", {"sliding_window": 0}, ["sliding_window = 0", "positive integer"]),
        ("mistral", {"sliding_window": "4096"}, ["sliding_window = '4096'"]),
        ("mistral", {"use_sliding_window": True}, ["use_sliding_window = True", "allowed: False"]),
        ("mistral", {"layer_types": [WINDOWED] * 4}, ["unknown key 'layer_types'"]),
        ("mistral", {"attention_bias": True}, ["unknown key 'attention_bias'"]),
        ("mistral", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, ["max_position_embeddings is missing", "yarn"]),
        ("mistral", {"hidden_act": "gelu"}, ["hidden_act = 'gelu'", "'silu'"]),
        ("mistral", {"num_attention_heads": 6, "num_key_value_heads": 4}, ["num_attention_heads 6"]),
        ("qwen2", SLIDING | {"sliding_window": -1}, ["sliding_window = -1"]),
        ("qwen2", SLIDING | {"max_window_layers": -1}, ["max_window_layers = -1", "at least 0"]),
        ("qwen2", {"use_sliding_window": "no"}, ["use_sliding_window = 'no'", "true or false"]),
        ("qwen2", {"layer_types": [FULL] * 3}, ["layer_types", "a list of 4"]),
        ("qwen2", {"layer_types": FULL}, ["layer_types = 'full_attention'", "a list of 4"]),
        ("qwen2", {"layer_types": [FULL] * 3 + ["chunked_attention"]}, ["layer_types", "'chunked_attention'", FULL]),
        ("qwen2", {"layer_types": [FULL] * 3 + [WINDOWED]}, ["layer_types", "use_sliding_window = False", "no window"]),
        ("qwen2", SLIDING | {"sliding_window": None, "layer_types": [WINDOWED] * 4}, ["sliding_window = None"]),
        ("qwen2", {"use_mrope": True}, ["use_mrope = True"]),
        ("qwen2", {"rope_scaling": {"type": "proportional", "factor": 2.0}}, ["rope_type", "proportional"]),
        ("qwen2", {"max_window_layer": 3}, ["unknown key 'max_window_layer'", "did you mean 'max_window_layers'"]),
        ("qwen3", {"attention_bias": True}, ["attention_bias = True", "allowed: False"]),
        ("qwen3", {"head_dim": None}, ["head_dim is missing"]),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 0.5}}, ["max_position_embeddings is missing"]),
        ("qwen3", {"num_experts": 128}, ["unknown key 'num_experts'"]),
        ("mixtral", {"num_local_experts": 0}, ["num_local_experts = 0", "positive integer"]),
        ("mixtral", {"num_experts_per_tok": 9}, ["num_experts_per_tok = 9", "has 8 experts"]),
        ("mixtral", {"router_jitter_noise": 0.1}, ["router_jitter_noise = 0.1", "allowed: 0"]),
        ("mixtral", {"output_router_logits": 1}, ["output_router_logits = 1", "true or false"]),
        ("mixtral", {"router_aux_loss_coef": -0.1}, ["router_aux_loss_coef = -0.1", "at least 0"]),
        ("mixtral", {"moe_intermediate_size": 8}, ["unknown key 'moe_intermediate_size'"]),
        ("mixtral", {"expert_capacity_factor": 1.0}, ["unknown key 'expert_capacity_factor'"]),
        ("qwen3_moe", {"num_experts": 4, "num_local_experts": 8}, ["num_experts = 4 and num_local_experts = 8"]),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3]}, ["no layer has experts"]),
        ("qwen3_moe", {"mlp_only_layers": "0"}, ["mlp_only_layers = '0'", "a list of layers"]),
        ("qwen3_moe", {"decoder_sparse_step": 0}, ["decoder_sparse_step = 0"]),
        ("qwen3_moe", {"norm_topk_prob": 1}, ["norm_topk_prob = 1", "true or false"]),
        ("qwen3_moe", {"head_dim": None}, ["head_dim is missing"]),
        ("qwen3_moe", {"layer_types": [FULL] * 4}, ["unknown key 'layer_types'"]),
    ],
)
def test_refuses_what_it_would_compute_wrongly(model_type: str, change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        architecture_of(TINY | {"model_type": model_type, "head_dim": 16} | change)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_have_transformers_shapes_and_the_known_size(name: str) -> None:
    config = PUBLISHED[name]
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    rules = [rule for rule in architecture_of(config).rules() if not rule.duplicate]
    named = [item for rule in rules for item in rule.hf_shapes().items()]
    assert dict(named) == {name: tuple(parameter.shape) for name, parameter in hf.named_parameters()}
    assert len(named) == len(dict(named))  # no tensor twice
    assert sum(torch.Size(shape).numel() for _, shape in named) == PARAMETERS[name]
    assert set(windows(config)) == ({4096, None} if name.startswith("Gemma") else {None})


@pytest.mark.parametrize(
    ("model_type", "change"),
    [
        (model_type, change)
        for model_type in ("mistral", "qwen2", "qwen3")
        for change in ({}, {"tie_word_embeddings": True}, {"head_dim": 24}, {"rope_theta": 1e6})
    ]
    + [("qwen2", {"num_key_value_heads": None}), ("qwen3", {"num_key_value_heads": None})],
    ids=str,
)
@pytest.mark.parametrize("left_out", ["", "num_key_value_heads", "rms_norm_eps", "head_dim"])
def test_what_is_left_out_means_what_it_means_to_transformers(
    model_type: str, change: dict[str, Any], left_out: str
) -> None:
    config = TINY | {"num_attention_heads": 32, "model_type": model_type} | change
    config.pop(left_out, None)
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    opened = architecture_of(config)
    wanted = {name: tuple(parameter.shape) for name, parameter in hf.named_parameters()}
    rules = [rule for rule in opened.rules() if not rule.duplicate]
    assert {name: shape for rule in rules for name, shape in rule.hf_shapes().items()} == wanted
    assert opened.transformer_config["layernorm_epsilon"] == hf.config.rms_norm_eps
    assert torch.equal(opened.inv_freq(), MistralRotaryEmbedding(hf.config).inv_freq)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mixtral"},
        {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 1, "rope_theta": 5e5},
        {"model_type": "qwen3_moe"},
        {"model_type": "qwen3_moe", "num_experts": 16, "norm_topk_prob": True, "mlp_only_layers": [1]},
        {"model_type": "qwen3_moe", "num_experts": 16, "decoder_sparse_step": 2, "moe_intermediate_size": 8},
        {"model_type": "qwen3_moe", "num_local_experts": 12, "head_dim": 24, "num_key_value_heads": 1},
    ],
    ids=str,
)
def test_experts_as_transformers_reads_them(change: dict[str, Any]) -> None:
    config = {key: value for key, value in (TINY | change).items() if key not in ("rms_norm_eps",)}
    hf = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf)
    opened = architecture_of(config)
    settings = opened.transformer_config
    assert settings["num_moe_experts"] == hf.num_experts and settings["moe_router_topk"] == hf.num_experts_per_tok
    assert settings["moe_router_pre_softmax"] == (not getattr(hf, "norm_topk_prob", True))
    assert settings["layernorm_epsilon"] == hf.rms_norm_eps
    assert torch.equal(opened.inv_freq(), MistralRotaryEmbedding(hf).inv_freq)
    shapes = opened.hf_shapes()
    for layer, part in enumerate(model.model.layers):
        own = {name: shape for name, shape in shapes.items() if f"layers.{layer}." in name}
        wanted = dict(part.named_parameters())
        assert sum(map(math.prod, own.values())) == sum(value.numel() for value in wanted.values())
        assert (opened.layers[layer].blocks[1] == "experts") == ("mlp.experts.down_proj" in wanted)
    wanted = {False: 0.0, True: 0.02}
    for used, coefficient in wanted.items():
        set_so = {"output_router_logits": used, "router_aux_loss_coef": 0.02}
        assert opened.family.balancing(config | set_so) == coefficient
    kept = architecture_of(keep_layers(config, [1, 3]))
    assert [layer.blocks for layer in kept.layers] == [opened.layers[layer].blocks for layer in (1, 3)]
    assert architecture_of(opened.hf_config).layers == opened.layers


@pytest.mark.parametrize(
    ("change", "wanted"),
    [({}, 4096), ({"sliding_window": None}, None), ({"sliding_window": 1}, 1), ({"sliding_window": 700}, 700)],
)
def test_mistral_windows(change: dict[str, Any], wanted: int | None) -> None:
    config = TINY | {"model_type": "mistral"} | change
    assert AutoConfig.for_model(**config).sliding_window == wanted
    assert windows(config) == [wanted] * 4


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"sliding_window": 8, "max_window_layers": 2},
        {"use_sliding_window": True},
        {"use_sliding_window": True, "max_window_layers": 0},
        SLIDING | {"max_window_layers": 2},
        SLIDING | {"max_window_layers": 99},
        SLIDING | {"max_window_layers": 2, "layer_types": [WINDOWED, FULL, WINDOWED, FULL]},
        SLIDING | {"layer_types": [WINDOWED] * 4},
        SLIDING | {"sliding_window": None},
        {"layer_types": [FULL] * 4, "sliding_window": None},
    ],
    ids=str,
)
def test_qwen_windows(model_type: str, change: dict[str, Any]) -> None:
    config = TINY | {"model_type": model_type} | change
    hf = AutoConfig.for_model(**config)
    assert windows(config) == [hf.sliding_window if kind == WINDOWED else None for kind in hf.layer_types]


@pytest.mark.parametrize(
    "change",
    [{}, {"layer_types": [WINDOWED, FULL, FULL, WINDOWED]}, {"max_window_layers": 1}, {"max_window_layers": 3}],
    ids=str,
)
def test_layers_that_are_kept_keep_their_windows(change: dict[str, Any]) -> None:
    config = TINY | {"model_type": "qwen2"} | SLIDING | change
    kept = keep_layers(config, [1, 3])
    before = windows(config)
    assert windows(kept) == [before[1], before[3]]
    assert kept["num_hidden_layers"] == 2 and config["num_hidden_layers"] == 4
