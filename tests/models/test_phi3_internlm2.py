"""Phi-3 and InternLM2: what each reads and refuses, the form of their weights, and what becomes of their folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from fusemega.convert.convert import export_megatron, import_hf
from fusemega.convert.verify import verify
from fusemega.errors import UserError
from fusemega.files.boxes import volume
from fusemega.hf.cut_layers import cut_layers
from fusemega.hf.folder import HFFolder
from fusemega.hf.load import load_hf
from fusemega.models.build import build_model
from fusemega.models.dense_logits import dense_logits
from fusemega.models.registry import architecture_of
from fusemega.models.rules import WeightRanks
from fusemega.prune.apply import planned
from fusemega.prune.order import ResidualBlock
from fusemega.runtime.parallel import World
from fusemega.text.tokenizer import Tokenizer
from tests.models.internlm2 import CODE, write_internlm2

TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PHI, INTERN = TINY | {"model_type": "phi3"}, TINY | {"model_type": "internlm2"}
LONGROPE = {"type": "longrope", "short_factor": [1.1, 1.2, 1.5], "long_factor": [1.0, 2.5, 6.0]}
PARTIAL = {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 12, "rope_scaling": LONGROPE}
PHI_CODE = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
DYNAMIC = {"type": "dynamic", "factor": 2.0}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"sliding_window": 7, "rope_scaling": None, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "rms_norm_eps": None},
        {"partial_rotary_factor": 0.5, "tie_word_embeddings": True, "num_key_value_heads": None},
        PARTIAL,
        {"rope_scaling": LONGROPE | {"type": "su"}, "partial_rotary_factor": 0.75},  # the first folders' name
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 5e3} | {k: LONGROPE[k] for k in list(LONGROPE)[1:]}}
        | {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 32},
    ],
    ids=str,
)
def test_phi3_has_transformers_shapes_and_rope(change: dict[str, Any]) -> None:
    config = {key: value for key, value in (PHI | change).items() if not (key == "rms_norm_eps" and value is None)}
    with torch.device("meta"):
        theirs = json.loads(json.dumps(config).replace('"su"', '"longrope"'))  # which transformers 5 no longer reads
        hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(**theirs))
    ours = architecture_of(config | {"auto_map": PHI_CODE})
    assert ours.hf_shapes() == {name: tuple(parameter.shape) for name, parameter in hf.named_parameters()}
    assert ours.transformer_config["layernorm_epsilon"] == hf.config.rms_norm_eps
    rope, text_rope = Phi3RotaryEmbedding(hf.config), ours.text_rope()
    assert torch.equal(ours.inv_freq(), rope.inv_freq)
    assert (1.0 if text_rope is None else text_rope.scale) == rope.attention_scaling
    window = config.get("sliding_window")
    assert ours.transformer_config.get("window_size") == (None if window is None else (window - 1, 0))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (PHI | {"resid_pdrop": 0.1}, ["resid_pdrop = 0.1", "allowed: 0"]),
        (PHI | {"sliding_window": 0}, ["sliding_window = 0"]),
        (PHI | {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling.rope_type", "linear", "longrope"]),
        (PHI | PARTIAL | {"partial_rotary_factor": 0.5}, ["short_factor has 3 numbers", "expected 2"]),
        (PHI | {"partial_rotary_factor": 0.1}, ["partial_rotary_factor = 0.1", "rotates 0 of a head's 8"]),
        (PHI | {"partial_rotary_factor": 1.5}, ["partial_rotary_factor = 1.5"]),
        (PHI | {"rope_scaling": 3}, ["rope_scaling = 3", "mapping"]),
        (PHI | {"head_dims": 8}, ["unknown key 'head_dims'"]),
        (INTERN | {"bias": True}, ["bias = True", "allowed: False"]),
        (INTERN | {"rope_scaling": {"type": "yarn", "factor": 2.0}}, ["rope_scaling.type", "yarn", "dynamic"]),
        (INTERN | {"rope_scaling": DYNAMIC | {"factor": 0.5}}, ["rope_scaling.factor = 0.5"]),
        (INTERN | {"architectures": ["InternLM2ForRewardModel"]}, ["InternLM2ForRewardModel", "InternLM2ForCausalLM"]),
        (INTERN | {"head_dim": 16}, ["head_dim = 16"]),
        (INTERN | {"partial_rotary_factor": 0.5}, ["unknown key 'partial_rotary_factor'"]),
    ],
    ids=str,
)
def test_refuses_what_it_would_compute_wrongly(config: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        architecture_of(config)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("config", [PHI, INTERN, PHI | {"num_key_value_heads": 1}], ids=str)
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_every_element_is_on_one_rank(config: dict[str, Any], tp_size: int) -> None:
    for rule in architecture_of(config).rules():
        if rule.partition_dim is not None:
            ranks = [WeightRanks(tp_size, rank) for rank in range(tp_size)]
            held = {(piece.hf, piece.hf_box) for rank in ranks for piece in rule.pieces(rank)}
            sizes = sum(volume(box) for _, box in held)
            assert sizes == sum(torch.Size(shape).numel() for shape in rule.hf_shapes().values())


def phi3(folder: Path) -> torch.nn.Module:
    """A random one, with longrope of a part of each head."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(json.dumps(PHI | PARTIAL)))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": PHI_CODE}))
    found: torch.nn.Module = model
    return found


def internlm2(folder: Path) -> LlamaForCausalLM:
    """A random one, written from the Llama that computes the same, with dynamic scaling beyond 12 positions."""
    torch.manual_seed(4)
    settings = TINY | {"max_position_embeddings": 12, "rope_scaling": DYNAMIC, "rope_theta": 1e6}
    model = LlamaForCausalLM(LlamaConfig(**json.loads(json.dumps(settings)))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    write_internlm2(folder, model, rope_theta=1e6, rope_scaling=DYNAMIC)
    return model


@pytest.mark.parametrize("write", [phi3, internlm2])
def test_imported_exported_cut_and_computed(world: World, tmp_path: Path, write: Any) -> None:
    source = tmp_path / "model"
    hf = write(source)
    texts = [torch.randint(0, 61, (n,)).tolist() for n in (19, 5, 12, 13)]
    with torch.no_grad():
        wanted = torch.cat([hf(torch.tensor([text])).logits[0] for text in texts])
    import_hf(source, tmp_path / "megatron")
    export_megatron(tmp_path / "megatron", tmp_path / "out")
    assert verify(source, tmp_path / "out").identical and verify(source, tmp_path / "megatron").identical
    assert HFFolder(tmp_path / "out").content_hash() == HFFolder(source).content_hash()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    # transformers has Phi-3, whose code in published folders is of before; InternLM2 it can only read with its code.
    assert config.get("auto_map") == (CODE if write is internlm2 else None)
    assert not list((tmp_path / "out").glob("*.py"))
    model = build_model(HFFolder(tmp_path / "out").architecture, world, torch.float32)
    load_hf(model, tmp_path / "out", world)
    got = dense_logits(model, world, texts)
    assert got is not None and wanted.abs().max() > 0.5
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-5)
    cut_layers(source, tmp_path / "cut", {1}, world)
    smaller = HFFolder(tmp_path / "cut").architecture
    assert len(smaller.layers) == 2 and len(smaller.hf_shapes()) == len(model.architecture.hf_shapes()) * 2 // 3 + 1


@pytest.mark.parametrize("config", [PHI, INTERN], ids=str)
def test_pruned_as_plain_and_else_refused(config: dict[str, Any]) -> None:
    architecture = architecture_of(config)
    attention, mlp = ResidualBlock("mha", 1), ResidualBlock("mlp", 1)
    layers, plain = planned(architecture, [attention, mlp], "plain")
    assert [halves.attention for halves in layers] == [0, 2] and architecture_of(plain).complete
    with pytest.raises(UserError, match="the form remote-code has no class for model_type"):
        planned(architecture, [attention], "remote-code")
    with pytest.raises(UserError, match="the form nemotron-nas has no weights in the form of this family"):
        planned(architecture, [attention], "nemotron-nas")


def test_tokenizers_of_folders_that_bring_code(tmp_path: Path) -> None:
    """tokenizer.json or tokenizer.model is enough; a vocabulary that only the folder's code reads is refused."""
    import sentencepiece

    (tmp_path / "text").write_text("the quick brown fox\n  jumps over 12 lazy dogs, déjà vu\n" * 20)
    settings = {
        "tokenizer_class": "InternLM2Tokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.A", "tokenization_internlm2_fast.B"]},
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    for name in ("model", "json", "neither"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(settings))
        (tmp_path / name / "config.json").write_text(json.dumps(INTERN | {"auto_map": CODE}))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "model" / "tokenizer"),
        vocab_size=310,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(str(tmp_path / "model" / "tokenizer.model"))
    found = Tokenizer.load(tmp_path / "model")
    found.hf.backend_tokenizer.save(str(tmp_path / "json" / "tokenizer.json"))
    texts = ["the fox", "  jumps\n 12 中 é", "dogs"]
    for one in (found, Tokenizer.load(tmp_path / "json")):
        assert [encoding.ids.tolist() for encoding in one.encode(texts)] == [theirs.encode(text) for text in texts]
    with pytest.raises(UserError, match="cannot load a tokenizer"):
        Tokenizer.load(tmp_path / "neither")
