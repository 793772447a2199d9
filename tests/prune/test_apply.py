"""A model written without blocks computes what the whole model does with these blocks masked in place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fusemega.convert.convert import export_megatron, import_hf
from fusemega.convert.verify import transformers_logits, verify
from fusemega.errors import UserError
from fusemega.files.boxes import whole
from fusemega.hf.cut_layers import cut_layers
from fusemega.hf.export import export_hf
from fusemega.hf.folder import HFFolder
from fusemega.hf.load import load_hf
from fusemega.models import modeling_pruned
from fusemega.models.build import build_model
from fusemega.models.dense_logits import dense_logits
from fusemega.models.registry import architecture_of
from fusemega.prune.apply import RECORD, apply_order
from fusemega.prune.order import ModelIdentity, Order
from fusemega.runtime.parallel import ParallelConfig, World, initialize
from tests.merge.conftest import entries, run_merge
from tests.prune.conftest import FAMILIES, FULL, SIZES, WINDOWED, WITH_EXPERTS, blocks, masked, order_of, save_model

PAIRED = "mlp 1, mha 2, mha 4, mlp 4"
SINGLE = "mha 0, mlp 2, mha 3, mlp 3"
IDS = torch.tensor([[5, 17, 3, 99, 42, 42, 7, 60, 11, 23, 4, 88]])
CASES = [
    *((family, "plain", PAIRED) for family in FAMILIES | WITH_EXPERTS),
    *((family, "remote-code", SINGLE) for family in FAMILIES),
    ("llama", "nemotron-nas", SINGLE),
    ("qwen2 without windows", "nemotron-nas", SINGLE),
]


@pytest.fixture
def world() -> World:
    """A world of this one process."""
    return initialize(ParallelConfig())


def made(
    world: World, tmp_path: Path, family: str, export: str, words: str, **settings: Any
) -> tuple[Path, Path, dict[str, Any]]:
    model_type, _, plain = family.partition(" without ")
    if plain:
        settings |= {"use_sliding_window": False, "layer_types": None}
    source = save_model(tmp_path / "whole", model_type, **settings)
    record = apply_order(source, order_of(words), tmp_path / "pruned", world, export=export)
    return source, tmp_path / "pruned", record


@pytest.mark.parametrize(("family", "export", "words"), CASES)
def test_logits_equal_masking_in_place_and_everything_comes_back(
    world: World, tmp_path: Path, family: str, export: str, words: str
) -> None:
    source, folder, record = made(world, tmp_path, family, export, words)
    with torch.no_grad():
        wanted = masked(source, blocks(words))(IDS, use_cache=False).logits
        assert (wanted - masked(source, [])(IDS, use_cache=False).logits).abs().max() > 1
        theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=export != "plain").eval()
        for use_cache in (False, True):
            torch.testing.assert_close(theirs(IDS, use_cache=use_cache).logits, wanted, atol=1e-5, rtol=0)
        asked = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        assert torch.equal(
            theirs.generate(IDS, use_cache=True, **asked), theirs.generate(IDS, use_cache=False, **asked)
        )
    opened = HFFolder(folder).architecture
    ours = build_model(opened, world, torch.float32)
    load_hf(ours, folder, world)
    logits_SV = dense_logits(ours, world, IDS.tolist())
    assert logits_SV is not None
    torch.testing.assert_close(logits_SV, wanted[0], atol=2e-5, rtol=0)
    # The same form comes out again, of a conversion and of a model in training.
    import_hf(folder, tmp_path / "megatron")
    export_megatron(tmp_path / "megatron", tmp_path / "again")
    export_hf(ours, tmp_path / "trained", folder, world)
    for again in (tmp_path / "again", tmp_path / "trained"):
        assert verify(folder, again).identical
        code = again / "modeling_pruned.py"
        assert code.exists() == (export != "plain")
        assert not code.exists() or code.read_bytes() == Path(modeling_pruned.__file__).read_bytes()
    assert record["parameters"]["after"] == sum(p.numel() for p in theirs.parameters())
    assert json.loads((folder / RECORD).read_text())["removed"] == words.split(", ")


@pytest.mark.parametrize(("export", "words"), [("plain", PAIRED), ("remote-code", SINGLE)])
def test_weights_are_kept_bit_for_bit(world: World, tmp_path: Path, export: str, words: str) -> None:
    source, folder, record = made(world, tmp_path, "qwen2", export, words, dtype=torch.bfloat16)
    old, new = HFFolder(source), HFFolder(folder)
    for name in new:
        if (parts := name.split("."))[1] == "layers":
            attention, mlp = record["layers"][int(parts[2])]
            in_attention = parts[3] in ("self_attn", "input_layernorm")
            parts[2] = str(attention if in_attention else mlp)
        box = whole(new.shape(name))
        assert torch.equal(new.read(name, box), old.read(".".join(parts), box))
    assert set(new) < set(old)


def test_windows_follow_the_attention(world: World, tmp_path: Path) -> None:
    _, folder, record = made(world, tmp_path, "qwen2", "plain", PAIRED)
    assert record["layers"] == [[0, 0], [1, 2], [3, 3]]
    config = HFFolder(folder).config
    assert (config["layer_types"], config["num_hidden_layers"]) == ([FULL, WINDOWED, FULL], 3)
    assert "block_configs" not in config and "auto_map" not in config


def test_a_cache_has_a_slot_for_each_attention_block(world: World, tmp_path: Path) -> None:
    _, folder, _ = made(world, tmp_path, "qwen2", "remote-code", SINGLE)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert model.config.layer_types == [FULL, WINDOWED, WINDOWED, WINDOWED]
    cache = model(IDS, use_cache=True).past_key_values
    assert cache.is_sliding == [True, True, True] and cache.get_seq_length() == IDS.numel()


def test_nemotron_nas_has_the_keys_that_its_readers_take(world: World, tmp_path: Path) -> None:
    source = save_model(tmp_path / "whole", intermediate_size=256)
    record = apply_order(source, order_of("mha 1, mlp 2, mha 4, mlp 4"), tmp_path / "out", world, export="nemotron-nas")
    config = HFFolder(tmp_path / "out").config
    whole_block = {
        "attention": {"n_heads_in_group": 2, "no_op": False, "replace_with_linear": False},
        "ffn": {"ffn_mult": 12.0, "no_op": False, "replace_with_linear": False},
    }
    no_attention = {"attention": {"n_heads_in_group": None, "no_op": True, "replace_with_linear": False}}
    no_ffn = {"ffn": {"ffn_mult": None, "no_op": True, "replace_with_linear": False}}
    entries = [whole_block, whole_block | no_attention, whole_block | no_ffn, whole_block]
    assert config["block_configs"] == entries
    assert (config["model_type"], config["architectures"]) == ("nemotron-nas", ["DeciLMForCausalLM"])
    assert (config["rope_theta"], config["rope_scaling"], config["attention_bias"]) == (10000.0, None, False)
    assert record["notes"] == []
    # Published folders leave sizes to the blocks, and bring code of their own.
    theirs = config | {"intermediate_size": None, "num_key_value_heads": None, "auto_map": {"AutoConfig": "other.Deci"}}
    assert architecture_of(theirs).hf_shapes() == architecture_of(config).hf_shapes()
    other = [*entries[:3], whole_block | {"ffn": {"ffn_mult": 24.0}}]
    with pytest.raises(UserError, match=r"block_configs\[3\].ffn.ffn_mult = 24.0 .* layers of different sizes"):
        architecture_of(theirs | {"block_configs": other})
    with pytest.raises(UserError, match="qkv_bias = 'yes'"):
        architecture_of(config | {"qkv_bias": "yes"})


def test_nemotron_nas_says_who_cannot_read_it(world: World, tmp_path: Path) -> None:
    notes = " ".join(made(world, tmp_path, "llama", "nemotron-nas", "mha 0")[2]["notes"])
    assert "vLLM breaks" in notes and "no multiple of 256" in notes


def test_a_pruned_folder_is_pruned_again(world: World, tmp_path: Path) -> None:
    for first, then, words in (
        ("nemotron-nas", "remote-code", "mlp 3"),
        ("remote-code", "plain", "mlp 0"),
    ):
        place = tmp_path / f"{first}-{then}"
        source, folder, _ = made(world, place, "llama", first, "mha 0, mha 4, mlp 4")
        apply_order(folder, order_of(words), place / "twice", world, export=then)
        model = AutoModelForCausalLM.from_pretrained(place / "twice", trust_remote_code=then != "plain").eval()
        with torch.no_grad():
            wanted = masked(source, blocks(f"mha 0, mha 4, mlp 4, {words}"))(IDS).logits
            torch.testing.assert_close(model(IDS).logits, wanted, atol=1e-5, rtol=0)


def test_a_pruned_folder_loses_whole_layers(world: World, tmp_path: Path) -> None:
    source, folder, _ = made(world, tmp_path, "llama", "remote-code", "mha 0, mlp 2")
    cut_layers(folder, tmp_path / "cut", [1], world)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", trust_remote_code=True).eval()
    with torch.no_grad():
        wanted = masked(source, blocks("mha 0, mlp 2, mha 1, mlp 1"))(IDS).logits
        torch.testing.assert_close(model(IDS).logits, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "export", "words", "message"),
    [
        ("llama", None, "mlp 1", "mha 2 would follow mha 1; allowed: --export nemotron-nas or --export remote-code"),
        ("llama", None, "mha 1", "mlp 1 would follow mlp 0"),
        ("llama", None, "mha 0", "it would begin with mlp 0"),
        ("qwen3", "plain", "mlp 4", "it would end with mha 4; allowed: --export remote-code, or"),
        ("qwen3", "nemotron-nas", "mlp 4", "no norms on queries and keys, which this qwen3 model has; allowed: remote"),
        ("mistral", "nemotron-nas", "mlp 4", "no sliding windows"),
        ("llama", "plane", "mlp 4", "--export: unknown name 'plane' .did you mean 'plain'"),
        ("llama", "plain", "mha 0, mha 1, mha 2, mha 3, mha 4", "leaves no attention block"),
        ("llama", "plain", "mha 7", "layers 0 to 4"),
    ],
)
def test_refused_before_anything_is_written(
    world: World, tmp_path: Path, family: str, export: str | None, words: str, message: str
) -> None:
    source = save_model(tmp_path / "whole", family)
    with pytest.raises(UserError, match=message):
        apply_order(source, order_of(words), tmp_path / "out", world, export=export)
    assert not (tmp_path / "out").exists()


def test_orders_of_others_and_too_many_blocks_are_refused(world: World, tmp_path: Path) -> None:
    source = save_model(tmp_path / "whole")
    order = order_of("mlp 4")
    with pytest.raises(UserError, match="asked for 2 removed blocks, and the order has 1"):
        apply_order(source, order, tmp_path / "out", world, blocks=2)
    named = Order(order.steps, order.type, model=ModelIdentity(SIZES["num_hidden_layers"], "llama", "0" * 32))
    with pytest.raises(UserError, match="an order for another model: its weights"):
        apply_order(source, named, tmp_path / "out", world)


def test_its_code_is_never_run_here(world: World, tmp_path: Path) -> None:
    _, folder, _ = made(world, tmp_path, "llama", "remote-code", SINGLE)
    (folder / "modeling_pruned.py").write_text("raise SystemExit('run')\n")
    with pytest.raises(UserError, match="without the code in the model's folder, which is never run"):
        transformers_logits(folder, [1], HFFolder(folder).architecture)
    with pytest.raises(UserError, match="auto_map asks for the folder's own Python code"):
        architecture_of(SIZES | {"model_type": "llama", "auto_map": {"AutoModel": "modeling_pruned.X"}})
    with pytest.raises(UserError, match="PrunedLlamaModel"):
        architecture_of(HFFolder(folder).config | {"architectures": ["PrunedLlamaModel"]})


@pytest.mark.parametrize("export", ["remote-code", "nemotron-nas"])
@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_forms_without_a_place_for_experts_are_refused(world: World, tmp_path: Path, family: str, export: str) -> None:
    with pytest.raises(UserError, match=f"the form {export} has no experts, which .*{family}.*; allowed"):
        made(world, tmp_path, family, export, SINGLE)
    assert not (tmp_path / "pruned").exists()


def test_models_with_experts_are_merged_expert_by_expert(tmp_path: Path) -> None:
    one = save_model(tmp_path / "one", "mixtral")
    other = save_model(tmp_path / "other", "mixtral", hidden_act="silu", vocab_size=SIZES["vocab_size"])
    halves = load_file(other / "model.safetensors")
    save_file({name: tensor * 3 for name, tensor in halves.items()}, other / "model.safetensors")
    out = run_merge(tmp_path / "out", merge_method="linear", models=entries([one, other], weight=[0.5, 0.5]))
    merged = HFFolder(out)
    assert set(merged) == set(halves) and len(halves) > 60
    for name, tensor in halves.items():
        torch.testing.assert_close(merged.read(name, whole(tuple(tensor.shape))), 2 * tensor)
