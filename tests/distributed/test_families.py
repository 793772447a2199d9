"""Small models of each family under every layout of four ranks, against transformers: logits, gradients, bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fusemega.files.boxes import whole
from fusemega.hf.folder import HFFolder
from tests.distributed.launch import run_ranks
from tests.distributed.workers.families import LAYOUTS, SEQUENCES
from tests.losses.sequence_mean import sequence_mean_loss
from tests.models.internlm2 import as_internlm2, write_internlm2

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 5}
# Without this factor attention is so sharp that rounding shows in the gradients.
LONGROPE = {
    "type": "longrope",
    "attention_factor": 1.1,
    "short_factor": [1.1, 1.2, 1.5],
    "long_factor": [1.0, 2.5, 6.0],
}
INTERNLM2 = "internlm2-dynamic"  # computed by a Llama
# Some have fewer key/value heads than there are tensor-parallel ranks.
MODELS: dict[str, dict[str, Any]] = {
    "mistral-windowed": {"model_type": "mistral", "vocab_size": 101, "sliding_window": 6},
    "mistral-unlimited": {"model_type": "mistral", "vocab_size": 101, "sliding_window": None, "head_dim": 12}
    | {"num_key_value_heads": 2},
    "qwen2-untied": {"model_type": "qwen2", "vocab_size": 103, "num_key_value_heads": 1},
    "qwen2-windowed-tied": {"model_type": "qwen2", "vocab_size": 101, "tie_word_embeddings": True}
    | SLIDING
    | {"layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]},
    "qwen3-tied": {"model_type": "qwen3", "vocab_size": 101, "head_dim": 16, "tie_word_embeddings": True}
    | {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
    "qwen3-windowed": {"model_type": "qwen3", "vocab_size": 99, "head_dim": 8, "max_window_layers": 3} | SLIDING,
    # Both caps bite: scores and logits are several times as large.
    "gemma2": {
        "model_type": "gemma2",
        "vocab_size": 101,
        "head_dim": 12,
        "sliding_window": 6,
        "query_pre_attn_scalar": 7,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3-two-ropes": {
        "model_type": "gemma3_text",
        "vocab_size": 101,
        "head_dim": 8,
        "sliding_window": 5,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 7,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "phi3-longrope": {"model_type": "phi3", "vocab_size": 102, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"sliding_window": 6, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 8, "pad_token_id": 0}
    | {"rope_scaling": LONGROPE},
    INTERNLM2: {"model_type": "internlm2", "vocab_size": 97, "num_key_value_heads": 2, "max_position_embeddings": 8}
    | {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
}
LENGTHS = (19, 1, 4, 8)  # both sides of every window; together a multiple of 4, for sequence parallelism


class Reference(NamedTuple):
    """What transformers computes in fp32."""

    logits_SV: torch.Tensor
    gradients: dict[str, torch.Tensor]
    sequences: dict[str, torch.Tensor]
    groups: dict[str, torch.Tensor]
    norm: float


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Reference]]:
    work = tmp_path_factory.mktemp("families")
    return work, written(work, MODELS)


def written(work: Path, models: dict[str, dict[str, Any]]) -> dict[str, Reference]:
    """Writes the models and their texts to `work`; what transformers makes of them."""
    references, texts = {}, {}
    for number, (name, settings) in enumerate(models.items()):
        torch.manual_seed(number)
        theirs = json.loads(json.dumps(SHAPE | settings | ({"model_type": "llama"} if name == INTERNLM2 else {})))
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**theirs)).float()
        with torch.no_grad():  # no weight that a mistake could leave unseen: biases not 0, norms not 1, sharp attention
            for key, parameter in model.named_parameters():
                centre = (
                    1.0 if key.endswith("norm.weight") and "gemma" not in name else 0.0
                )  # Gemma's scale by 1 + weight
                parameter.normal_(centre, 0.3)
        if name == INTERNLM2:
            write_internlm2(work / name, model, rope_scaling=settings["rope_scaling"])
        else:
            model.save_pretrained(work / name, max_shard_size="20KB")
        texts[name] = [torch.randint(1, settings["vocab_size"], (n,)).tolist() for n in LENGTHS]
        # (from 1: transformers gives the embedding of Gemma's pad token, 0, no gradient)
        logits_SV, hidden = logits_and_hidden(model, texts[name])
        torch.save(hidden, work / name / "hidden.pt")
        parts = logits_SV.split(LENGTHS)
        logp = [
            -torch.nn.functional.cross_entropy(part[:-1], torch.tensor(text[1:], dtype=torch.int64), reduction="sum")
            for part, text in zip(parts, texts[name], strict=True)
        ]
        tokens_S = torch.tensor(LENGTHS) - 1
        losses = [
            sequence_mean_loss(torch.stack(logp), tokens_S) / len(LENGTHS),
            sum(-torch.nn.functional.logsigmoid(0.1 * (logp[i] - logp[i + 1])) for i in (0, 2)) / 2,  # DPO's form
            -sum(logp) / int(tokens_S.sum()),
        ]
        keys, parameters = zip(*model.named_parameters(), strict=True)
        sequences, groups, gradients = (
            dict(zip(keys, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True)) for loss in losses
        )
        norm = torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm()
        if name == INTERNLM2:
            sizes = model.config.num_attention_heads, model.config.num_key_value_heads
            sequences, groups, gradients = (as_internlm2(each, *sizes) for each in (sequences, groups, gradients))
        references[name] = Reference(logits_SV.detach(), gradients, sequences, groups, float(norm))
    (work / "texts.json").write_text(json.dumps(texts))
    return references


@pytest.fixture(scope="module")
def ranks(references: tuple[Path, dict[str, Reference]]) -> list[dict[str, Any]]:
    return run_ranks("families.py", 4, str(references[0]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_gradients_and_bits(
    references: tuple[Path, dict[str, Reference]], ranks: list[dict[str, Any]], name: str, layout: str
) -> None:
    work, reference = references[0], references[1][name]
    assert HFFolder(work / f"{name}.{layout}").content_hash() == HFFolder(work / name).content_hash()
    if "CP" not in layout:
        logits_SV = torch.load(work / f"{name}.{layout}.logits.pt")
        assert reference.logits_SV.abs().max() > 1
        torch.testing.assert_close(logits_SV, reference.logits_SV, atol=2e-5, rtol=1e-5)
    assert_gradients(work / f"{name}.{layout}.gradients", reference.gradients)
    for result in ranks:
        seen = result[f"{name} {layout}"]
        assert seen["unequal"] == 0  # what tensor-parallel ranks hold twice has one gradient
        assert seen["norm"] == pytest.approx(reference.norm, rel=1e-5)


def logits_and_hidden(model: Any, texts: list[list[int]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of all tokens: the logits, and hidden states at the points that the worker asks for."""
    inside: list[torch.Tensor] = []
    layer = model.model.layers[1]
    norm = getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm)
    hook = norm.register_forward_pre_hook(lambda _, args: inside.append(args[0][0].detach()))
    found = [model(torch.tensor([text]), output_hidden_states=True) for text in texts]
    hook.remove()
    after_layer_2 = torch.cat([one.hidden_states[3][0].detach() for one in found])
    hidden = {"output 2": after_layer_2, "input 3": after_layer_2, "mlp_input 1": torch.cat(inside)}
    return torch.cat([one.logits[0] for one in found]), hidden


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hidden_states_inside_the_model(ranks: list[dict[str, Any]], layout: str) -> None:
    """Each point comes out on the ranks of the stage that holds its layer, as transformers has it."""
    for name in MODELS:
        held = [result[f"{name} {layout}"]["hidden"] for result in ranks]
        assert {point for errors in held for point in errors} == {"input 3", "mlp_input 1", "output 2"}
        stages = 2 if "PP2" in layout else 1
        assert all(sum(point in errors for errors in held) == len(ranks) // stages for point in ("input 3", "output 2"))
        assert all(error < 5e-6 for errors in held for error in errors.values()), (name, held)


def assert_gradients(folder: Path, gradients: dict[str, torch.Tensor]) -> None:
    """The folder has, in the weights' place, these gradients."""
    exported = HFFolder(folder)
    assert set(exported) == set(gradients)
    for key, wanted in gradients.items():
        got = exported.read(key, whole(tuple(wanted.shape)))
        assert wanted.abs().max() > 1e-5, key
        error = float((got - wanted).norm() / wanted.norm())
        assert error < 2e-5, f"{key}: {error:.1e}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [name for name in SEQUENCES if name in MODELS])
def test_gradients_of_losses_that_couple_tokens_or_texts(
    references: tuple[Path, dict[str, Reference]], ranks: list[dict[str, Any]], name: str, layout: str
) -> None:
    work, reference = references[0], references[1][name]
    assert_gradients(work / f"{name}.{layout}.sequences", reference.sequences)
    assert_gradients(work / f"{name}.{layout}.groups", reference.groups)


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {INTERNLM2}))
def test_the_exported_folder_gives_the_same_logits_in_transformers(
    references: tuple[Path, dict[str, Reference]], ranks: list[dict[str, Any]], name: str
) -> None:
    work, reference = references[0], references[1][name]
    texts = json.loads((work / "texts.json").read_text())[name]
    model = AutoModelForCausalLM.from_pretrained(work / f"{name}.TP2PP2SP", dtype=torch.float32)
    with torch.no_grad():
        logits_SV = torch.cat([model(torch.tensor([text])).logits[0] for text in texts])
    # Not bitwise: loading the same weights from disk moves the last bits in transformers itself.
    torch.testing.assert_close(logits_SV, reference.logits_SV, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["TP1PP1", "TP4PP1SP"])
def test_biases_and_norms_are_not_decayed(ranks: list[dict[str, Any]], layout: str) -> None:
    plain = {kind for name in MODELS for kind in ranks[0][f"{name} {layout}"]["plain"]}
    decayed = {kind for name in MODELS for kind in ranks[0][f"{name} {layout}"]["decayed"]}
    norms = {f"{which}layernorm.weight" for which in ("input_", "pre_mlp_", "post_", "final_", "q_", "k_")}
    assert {"linear_qkv.bias"} | norms == plain
    assert not plain & decayed and "linear_qkv.weight" in decayed
