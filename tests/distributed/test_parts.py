"""A head that gives a score, and layers without attention or MLP: trained on two ranks, against transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM
from transformers import LlamaForSequenceClassification as LlamaScore

from fusemega.files.boxes import whole
from fusemega.hf.folder import HFFolder
from tests.distributed.launch import run_ranks
from tests.distributed.test_families import assert_gradients
from tests.distributed.workers.parts import LAYOUTS, LR, STEPS

SHAPE: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LENGTHS = (9, 4, 12, 3)
BLOCKS = [{}, {"attention": {"no_op": True}}, {"ffn": {"no_op": True}}, {"attention": {"no_op": False}}]
LEFT_OUT = ("layers.1.self_attn.", "layers.1.input_layernorm.", "layers.2.mlp.", "layers.2.post_attention_layernorm.")


def scores(model: Any, texts: list[list[int]]) -> torch.Tensor:
    return torch.cat([model(torch.tensor([text])).logits[0] for text in texts])


def preference_loss(model: Any, texts: list[list[int]]) -> torch.Tensor:
    scores_S = scores(model, texts)
    return -logsigmoid(scores_S[0::2] - scores_S[1::2]).mean()


def next_token_loss(model: Any, texts: list[list[int]]) -> torch.Tensor:
    logits = torch.cat([model(torch.tensor([text])).logits[0, :-1] for text in texts])
    return cross_entropy(logits, torch.tensor([token for text in texts for token in text[1:]]))


def without_blocks(model: LlamaForCausalLM) -> None:
    """transformers' model with the residual stream led past two blocks."""
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
    model.model.layers[2].mlp.forward = torch.zeros_like


def trained(model: Any, loss: Callable[[Any, list[list[int]]], torch.Tensor], texts: list[list[int]]) -> dict[str, Any]:
    """Gradients of the first step, and the weights after all."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    gradients: dict[str, torch.Tensor] = {}
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(model, texts).backward()
        if not gradients:
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    return {"gradients": gradients, "weights": {n: p.detach() for n, p in model.named_parameters()}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    work = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    texts = [torch.randint(0, SHAPE["vocab_size"], (n,)).tolist() for n in LENGTHS]
    (work / "texts.json").write_text(json.dumps(texts))
    score = LlamaScore(LlamaConfig(**SHAPE, num_labels=1, tie_word_embeddings=True))
    blocks = LlamaForCausalLM(LlamaConfig(**SHAPE))
    for model in (score, blocks):
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm" in key else 0.0, 0.3)
    score.save_pretrained(work / "score")
    (work / "blocks").mkdir()
    kept = {name: p for name, p in blocks.state_dict().items() if not any(part in name for part in LEFT_OUT)}
    assert len(kept) == len(blocks.state_dict()) - 5 - 4
    save_file(kept, work / "blocks" / "model.safetensors")
    config = {**blocks.config.to_diff_dict(), "architectures": ["LlamaForCausalLM"], "block_configs": BLOCKS}
    (work / "blocks" / "config.json").write_text(json.dumps(config))
    without_blocks(blocks)
    with torch.no_grad():
        logits_SV = torch.cat([blocks(torch.tensor([text])).logits[0] for text in texts])
    reference = {
        "score": trained(score, preference_loss, texts) | {"scores": scores(score, texts).flatten().detach()},
        "blocks": trained(blocks, next_token_loss, texts) | {"logits": logits_SV},
    }
    return work, reference, run_ranks("parts.py", 2, str(work))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["score", "blocks"])
def test_gradients_and_trained_weights(
    run: tuple[Path, dict[str, Any], list[dict[str, Any]]], name: str, layout: str
) -> None:
    work, references, ranks = run
    reference = references[name]
    if layout != "DP2":  # there the gradients end in shards
        assert_gradients(work / f"{name}.{layout}.gradients", reference["gradients"])
        assert [rank[f"{name} {layout}"]["unequal"] for rank in ranks] == [0, 0]
    made = HFFolder(work / f"{name}.{layout}")
    before = HFFolder(work / name)
    assert set(made) == set(reference["gradients"])
    for key in made:
        box = whole(made.shape(key))
        assert (made.read(key, box) - before.read(key, box)).abs().max() > LR
        torch.testing.assert_close(made.read(key, box), reference["weights"][key], atol=LR / 20, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_of_layers_without_a_block(run: tuple[Path, dict[str, Any], list[dict[str, Any]]], layout: str) -> None:
    work, references, _ = run
    assert references["blocks"]["logits"].abs().max() > 1
    logits_SV = torch.load(work / f"blocks.{layout}.logits.pt")
    torch.testing.assert_close(logits_SV, references["blocks"]["logits"], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transformers_loads_the_exported_scores(
    run: tuple[Path, dict[str, Any], list[dict[str, Any]]], layout: str
) -> None:
    work, references, ranks = run
    texts = json.loads((work / "texts.json").read_text())
    model = AutoModelForSequenceClassification.from_pretrained(work / f"score.{layout}", dtype=torch.float32)
    with torch.no_grad():
        found = scores(model, texts).flatten()
    (ours,) = ranks[1][f"score {layout}"]["trained"]  # the last stage is on the second rank
    torch.testing.assert_close(found, torch.tensor(ours), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found, references["score"]["scores"], atol=2e-3, rtol=1e-3)
    assert [rank[f"score {layout}"]["heads"] for rank in ranks] == ([0, 1] if layout == "PP2 uneven" else [1, 1])


@pytest.mark.parametrize("name", ["score", "blocks"])
def test_conversions_and_megatrons_writer_agree(
    run: tuple[Path, dict[str, Any], list[dict[str, Any]]], name: str
) -> None:
    assert [rank[f"{name} stored"] for rank in run[2]] == [[True] * 4, [True]]
