"""The Llama family: what it refuses, its frequencies against transformers, its rules against transformers' names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fusemega.errors import UserError
from fusemega.files.boxes import volume
from fusemega.models.llama import Llama
from fusemega.models.registry import architecture_of
from fusemega.models.rope import longest_text, rope_parameters
from fusemega.models.rules import WeightRanks

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "lama"}, ["model_type", "'lama'", "did you mean 'llama'"]),
        ({"model_type": "gpt2"}, ["model_type", "'gpt2'", "allowed: gemma2"]),
        ({"model_type": None}, ["model_type is missing"]),
        ({"auto_map": {"AutoModel": "x.Y"}}, ["auto_map", "never run"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "'silu'"]),
        ({"attention_bias": True}, ["attention_bias", "True", "False"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"attention_dropout": 0.1}, ["attention_dropout", "0.1"]),
        ({"rope_interleaved": True}, ["rope_interleaved"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"final_logit_softcapping": 30.0}, ["unknown key 'final_logit_softcapping'", "30.0"]),
        ({"embedding_multiplier": 12}, ["unknown key 'embedding_multiplier'"]),
        ({"rms_norm_epsilon": 1e-5}, ["did you mean 'rms_norm_eps'"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads 4", "num_key_value_heads 3"]),
        ({"hidden_size": 66}, ["hidden_size 66", "num_attention_heads 4"]),
        ({"head_dim": 15}, ["head_dim 15", "odd"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers = 0"]),
        ({"vocab_size": "259"}, ["vocab_size = '259'"]),
        ({"intermediate_size": None}, ["intermediate_size is missing"]),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, ["rope_scaling.rope_type", "su", "longrope"]),
        ({"rope_parameters": {"rope_type": "yarn"}}, ["rope_parameters.factor is missing", "yarn"]),
        ({"rope_scaling": {"type": "linear"}}, ["rope_scaling.factor is missing"]),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, ["rope_scaling.factor = -1"]),
        ({"rope_scaling": LLAMA3 | {"beta_fast": 3}}, ["unknown key(s) 'beta_fast'"]),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
    ],
)
def test_refuses_what_it_would_compute_wrongly(change: dict[str, Any], words: list[str]) -> None:
    config = {key: value for key, value in (CONFIG | change).items() if not (key == "model_type" and value is None)}
    with pytest.raises(UserError) as error:
        architecture_of(config)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "extra",
    [
        {"rope_interleaved": False, "is_llama_config": True, "transformers.js_config": {}, "unk_token_id": 0},
        {"torch_dtype": "bfloat16", "rope_theta": 500000.0, "rope_scaling": LLAMA3, "attention_bias": False},
        {"rope_scaling": None, "pretraining_tp": 1, "use_cache": False, "bos_token_id": 1, "_name_or_path": "x"},
        {"rope_theta": 5000000.0, "attention_dropout": 0.0, "max_sequence_length": 2048, "hidden_act": "silu"},
    ],
    ids=["SmolLM2", "Llama 3.2", "SOLAR", "Yi"],
)
def test_accepts_published_configurations(extra: dict[str, Any]) -> None:
    assert isinstance(architecture_of(CONFIG | extra).family, Llama)


@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_theta": 500000.0},
        {"rope_theta": 50000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
        {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1234.5}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1234.5, "factor": 2.5}, "head_dim": 24},
    ],
)
def test_frequencies_equal_those_of_transformers(rope: dict[str, Any]) -> None:
    config = CONFIG | rope
    hf = LlamaConfig(**{key: value for key, value in config.items() if key != "model_type"})
    wanted = LlamaRotaryEmbedding(hf)
    assert wanted.attention_scaling == 1.0
    assert torch.equal(Llama().inv_freq(config), wanted.inv_freq)


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({}, 8192),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 32768),
        ({"rope_scaling": LLAMA3, "max_position_embeddings": 131072}, 131072),
        ({"max_position_embeddings": None}, 2048),
    ],
)
def test_the_longest_text_is_after_scaling(rope: dict[str, Any], longest: int) -> None:
    assert longest_text(CONFIG | {"max_position_embeddings": 8192} | rope) == longest


def test_a_theta_inside_the_mapping_wins_over_one_beside_it() -> None:
    config = CONFIG | {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": 9.0}}
    assert rope_parameters(config)["rope_theta"] == 9.0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head_dim", [None, 24])
def test_rules_name_every_tensor_of_transformers_with_its_shape(tied: bool, head_dim: int | None) -> None:
    config = CONFIG | {"tie_word_embeddings": tied, "head_dim": head_dim}
    with torch.device("meta"):
        hf = LlamaForCausalLM(LlamaConfig(**{key: value for key, value in config.items() if key != "model_type"}))
    wanted = {name: tuple(parameter.shape) for name, parameter in hf.named_parameters()}
    rules = architecture_of(config).rules()
    named = [(name, shape) for rule in rules if not rule.duplicate for name, shape in rule.hf_shapes().items()]
    assert dict(named) == wanted
    assert len(named) == len(wanted)  # no tensor twice
    assert len({rule.megatron for rule in rules}) == len(rules)
    for tp_size in (1, 2):
        held = sum(
            volume(piece.hf_box)
            for rule in rules
            if not rule.duplicate
            for tp_rank in range(tp_size if rule.partition_dim is not None else 1)
            for piece in rule.pieces(WeightRanks(tp_size, tp_rank))
        )
        assert held == sum(parameter.numel() for parameter in hf.parameters())
