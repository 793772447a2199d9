"""Rotary positions that depend on more than a position, against transformers' own: frequencies, scales, lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fusemega.errors import UserError
from fusemega.hf.load import load_hf
from fusemega.models.build import build_model
from fusemega.models.dense_logits import dense_logits
from fusemega.models.registry import architecture_of
from fusemega.runtime.parallel import World
from tests.models.test_llama import CONFIG

ORIGINAL = {"original_max_position_embeddings": 24}
DYNAMIC = {"rope_type": "dynamic", "factor": 3.0}
SHORT, LONG = [1.0 + i / 16 for i in range(8)], [2.0 + i for i in range(8)]
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, **ORIGINAL}


def opened(rope: dict[str, Any], **change: Any) -> tuple[Any, LlamaConfig]:
    """Ours, and transformers' configuration: heads of 16, trained on 32 positions."""
    config = {**CONFIG, "max_position_embeddings": 32, "rope_theta": 5e4, "rope_scaling": rope, **change}
    hf = LlamaConfig(**{key: value for key, value in config.items() if key != "model_type"})
    return architecture_of(config), hf


@pytest.mark.parametrize(
    "rope",
    [
        {"type": "yarn", "factor": 4.0} | ORIGINAL,  # as Qwen2.5 documents it
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "factor": 40.0, "beta_fast": 8, "beta_slow": 0.5, "truncate": False} | ORIGINAL,
        {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7, "mscale_all_dim": 1.3, "attention_factor": None},
        {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.5},
        {"rope_type": "yarn", "factor": 1.0},
        DYNAMIC,
        LONGROPE,
        LONGROPE | {"factor": 7.5},
        LONGROPE | {"attention_factor": 0.9},
        LONGROPE | {"original_max_position_embeddings": 64},
    ],
    ids=str,
)
def test_frequencies_and_scale_equal_those_of_transformers(rope: dict[str, Any]) -> None:
    ours, hf = opened(rope)
    kind = str(rope.get("rope_type", rope.get("type")))
    wanted, scale = ROPE_INIT_FUNCTIONS[kind](hf)
    assert torch.equal(ours.inv_freq(), wanted)
    text_rope = ours.text_rope()
    assert text_rope.scale == scale
    changes = {"yarn": None, "dynamic": 32, "longrope": rope.get("original_max_position_embeddings")}
    assert text_rope.same_up_to == changes[kind]
    for length in (33, 65, 100) if text_rope.same_up_to is not None else ():
        # Each time a new module, which has seen no longer text.
        module = LlamaRotaryEmbedding(hf)
        cos, _ = module(torch.zeros(1), torch.arange(length)[None])
        frequencies = text_rope.frequencies(length) if length > text_rope.same_up_to else ours.inv_freq()
        assert torch.equal(frequencies, module.inv_freq)
        angles = torch.outer(torch.arange(length).float(), frequencies)
        torch.testing.assert_close((angles.cos() * text_rope.scale).repeat(1, 2), cos[0], rtol=0, atol=1e-6)


def test_plain_ropes_have_nothing_besides() -> None:
    for rope in (None, {"rope_type": "linear", "factor": 2.0}):
        assert opened(rope or {})[0].text_rope() is None


@pytest.mark.parametrize(
    ("rope", "longest"), [({"type": "yarn", "factor": 4.0} | ORIGINAL, 96), (DYNAMIC, 96), (LONGROPE, 32)], ids=str
)
def test_the_longest_text_is_after_scaling(rope: dict[str, Any], longest: int) -> None:
    ours, _ = opened(rope)
    assert ours.family.longest_text(ours.hf_config) == longest


@pytest.mark.parametrize(
    ("rope", "change", "words"),
    [
        ({"type": "yarn"}, {}, ["rope_scaling.factor is missing"]),
        ({"type": "yarn", "factor": 0.5}, {}, ["rope_scaling.factor = 0.5", "at least 1"]),
        ({"type": "yarn", "factor": 2, "beta_fast": -1}, {}, ["rope_scaling.beta_fast = -1"]),
        ({"type": "yarn", "factor": 2, "truncate": 1}, {}, ["truncate = 1", "true or false"]),
        ({"type": "yarn", "factor": 2, "finetuned": True}, {}, ["unknown key(s) 'finetuned'"]),
        ({"type": "yarn", "factor": 2}, {"rope_theta": 1}, ["rope_theta = 1", "above 1"]),
        (DYNAMIC | {"alpha": 3}, {}, ["unknown key(s) 'alpha'"]),
        (DYNAMIC, {"head_dim": 2}, ["more than 2"]),
        (DYNAMIC, {"max_position_embeddings": None}, ["max_position_embeddings is missing"]),
        (LONGROPE | {"long_factor": LONG[:-1]}, {}, ["long_factor (7)", "short_factor (8)"]),
        (LONGROPE, {"head_dim": 24}, ["short_factor has 8 numbers", "expected 12"]),
        (LONGROPE | {"short_factor": 1.0}, {}, ["short_factor is a float", "list"]),
        (LONGROPE | {"short_factor": [*SHORT[:-1], "2"]}, {}, ["short_factor = '2'"]),
        (LONGROPE | {"original_max_position_embeddings": 1}, {}, ["above 1"]),
    ],
    ids=str,
)
def test_refuses_what_it_would_compute_wrongly(rope: dict[str, Any], change: dict[str, Any], words: list[str]) -> None:
    config = {**CONFIG, "max_position_embeddings": 32, "rope_theta": 5e4, "rope_scaling": rope, **change}
    with pytest.raises(UserError) as error:
        architecture_of(config)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("rope", [DYNAMIC, LONGROPE, {"rope_type": "yarn", "factor": 4.0}], ids=str)
def test_each_text_of_a_row_is_rotated_by_its_own_length(world: World, tmp_path: Path, rope: dict[str, Any]) -> None:
    ours, hf_config = opened(rope)
    hf = LlamaForCausalLM(hf_config).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.mul_(4.0)  # logits that positions move
    hf.save_pretrained(tmp_path)
    model = build_model(ours, world, torch.float32)
    load_hf(model, tmp_path, world)
    texts = [torch.randint(0, 259, (n,)).tolist() for n in (40, 7, 24, 33)]
    with torch.no_grad():
        wanted = torch.cat([hf(torch.tensor([text])).logits[0] for text in texts])
    got = dense_logits(model, world, texts)
    assert got is not None
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-5)
