"""Building a model in one process: layouts refused, hidden states against transformers, weights drawn from a seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fusemega.models.build import build_model, init_random
from fusemega.models.dense_logits import dense_logits
from fusemega.models.registry import architecture_of
from fusemega.runtime.parallel import World

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_gives_hidden_states_of_the_models_dtype(world: World, dtype: torch.dtype) -> None:
    model = build_model(architecture_of(CONFIG), world, dtype)
    init_random(model, world, seed=3)
    ids = torch.arange(9)[None]
    hidden = model.chunks[0](ids, ids, None)
    assert hidden.shape == (9, 1, 32)
    assert hidden.dtype is dtype
    assert model.head.weight.shape == (101, 32)
    assert model.vocab_size == 101
    assert all(parameter.dtype is dtype for parameter in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_those_of_transformers(world: World, tmp_path: Path, tied: bool) -> None:
    from fusemega.hf.load import load_hf

    hf = LlamaForCausalLM(
        LlamaConfig(**{key: value for key, value in CONFIG.items() if key != "model_type"}, tie_word_embeddings=tied)
    ).eval()
    hf.save_pretrained(tmp_path)
    model = build_model(architecture_of(CONFIG | {"tie_word_embeddings": tied}), world, torch.float32)
    load_hf(model, tmp_path, world)
    texts = [torch.randint(0, 101, (n,)).tolist() for n in (7, 1, 12)]
    with torch.no_grad():
        wanted = torch.cat([hf(torch.tensor([text])).logits[0] for text in texts])
    got = dense_logits(model, world, texts)
    assert got is not None
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_random_biases_are_0_and_norms_1(world: World, model_type: str) -> None:
    model = build_model(architecture_of(CONFIG | {"model_type": model_type, "head_dim": 8}), world, torch.float32)
    init_random(model, world, seed=1)
    vectors = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() == 1}
    kinds = {name.split(".")[-2] for name in vectors}
    assert {"qwen2": {"linear_qkv"}, "qwen3": {"q_layernorm", "k_layernorm"}}[model_type] <= kinds
    for name, vector in vectors.items():
        assert torch.equal(vector, torch.zeros_like(vector) if name.endswith("bias") else torch.ones_like(vector))


def test_random_weights_depend_on_seed_and_name_alone(world: World) -> None:
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        model = build_model(architecture_of(CONFIG | {"initializer_range": 0.05}), world, torch.float32)
        init_random(model, world, seed)
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    first, again, other = drawn(1), drawn(1), drawn(2)
    for name, value in first.items():
        assert torch.equal(value, again[name])
        if "norm" in name:
            assert torch.equal(value, torch.ones_like(value))
        else:
            assert not torch.equal(value, other[name])
            assert 0.04 < value.std() < 0.06
    a, b = (first[f"chunks.0.decoder.layers.{layer}.mlp.linear_fc2.weight"] for layer in (0, 1))
    assert not torch.equal(a, b)
