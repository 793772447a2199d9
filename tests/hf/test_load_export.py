"""Load and export in one process; the multi-rank ones are in tests/distributed/test_weights.py."""

from __future__ import annotations

import errno
import filecmp
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fusemega.errors import UserError
from fusemega.hf import export as hf_export
from fusemega.hf.export import export_hf
from fusemega.hf.folder import HFFolder
from fusemega.hf.hub import resolve
from fusemega.hf.load import load_hf
from fusemega.models.build import GPT, build_model
from fusemega.runtime.parallel import World
from tests.checkpoint.conftest import save_llama


def loaded(folder: Path, world: World, dtype: torch.dtype = torch.float32) -> GPT:
    model = build_model(HFFolder(folder).architecture, world, dtype)
    load_hf(model, folder, world)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_the_exported_folder_is_byte_for_byte_what_save_pretrained_wrote(
    world: World, tmp_path: Path, dtype: torch.dtype, tied: bool
) -> None:
    source = save_llama(tmp_path / "source", dtype, "10KB", tie_word_embeddings=tied)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt"):
        (source / name).write_text(f"contents of {name}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("tools")
    out = tmp_path / "out"
    export_hf(loaded(source, world, dtype), out, source, world, max_shard_size=10_000)
    names = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    there = {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    assert there == {*names, Path("integrity.json")}
    _, different, missing = filecmp.cmpfiles(source, out, [str(name) for name in names], shallow=False)
    assert (different, missing) == ([], [])


def test_exported_python_code_and_pickles_stay_behind(world: World, tmp_path: Path, folder: Path) -> None:
    (folder / "modeling.py").write_text("raise SystemExit")
    (folder / "training_args.bin").write_text("x")
    out = tmp_path / "out"
    export_hf(loaded(folder, world), out, folder, world)
    names = ["config.json", "generation_config.json", "integrity.json", "model.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == names
    AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize(
    ("chosen", "wanted"),
    [(None, torch.bfloat16), (torch.float32, torch.float32), (torch.float16, torch.float16)],
)
def test_dtype_is_the_sources_unless_chosen(
    world: World, tmp_path: Path, chosen: torch.dtype | None, wanted: torch.dtype
) -> None:
    source = save_llama(tmp_path / "source", torch.bfloat16)
    out = tmp_path / "out"
    export_hf(loaded(source, world, torch.float32), out, source, world, dtype=chosen)
    exported = HFFolder(out)
    assert {exported.dtype(name) for name in exported} == {wanted}
    assert exported.config["dtype"] == str(wanted).removeprefix("torch.")
    assert "torch_dtype" not in exported.config


def test_narrower_models_round_to_nearest_even(world: World, folder: Path) -> None:
    model = loaded(folder, world, torch.bfloat16)
    whole = {name: value for shard in folder.glob("*.safetensors") for name, value in load_file(shard).items()}
    assert torch.equal(model.head.weight, whole["lm_head.weight"].to(torch.bfloat16))


def _edit(folder: Path, change: dict[str, torch.Tensor | None], config: dict[str, Any] | None = None) -> None:
    """Rewrites a folder as one file with tensors replaced, added or (None) removed."""
    tensors = {name: value for shard in folder.glob("*.safetensors") for name, value in load_file(shard).items()}
    for file in folder.glob("model*"):
        file.unlink()
    kept = {name: value for name, value in (tensors | change).items() if value is not None}
    save_file(kept, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        ({"model.norm.weight": None}, {}, ["tensor model.norm.weight is missing"]),
        ({"model.norm.weight": None, "model.norm.weigt": torch.ones(32)}, {}, ["did you mean 'model.norm.weigt'"]),
        ({"model.norm.bias": torch.ones(32)}, {}, ["tensor model.norm.bias is not part of this architecture"]),
        ({"model.norm.weight": torch.ones(33)}, {}, ["model.norm.weight has shape [33]", "config.json says [32]"]),
        ({}, {"intermediate_size": 64}, ["gate_proj.weight has shape [48, 32]", "[64, 32]"]),
        ({}, {"vocab_size": 100}, ["embed_tokens.weight has shape [101, 32]", "[100, 32]"]),
        ({}, {"num_hidden_layers": 1}, ["tensor model.layers.1.", "is not part of this architecture"]),
        ({}, {"num_hidden_layers": 3}, ["tensor model.layers.2.", "is missing"]),
        ({"model.norm.weight": torch.ones(32, dtype=torch.int8)}, {}, ["model.norm.weight is of type I8"]),
        ({}, {"tie_word_embeddings": True}, ["ties the head", "lm_head.weight differs from model.embed_tokens.weight"]),
    ],
)
def test_weights_that_disagree_with_the_configuration(
    world: World, folder: Path, change: dict[str, Any], config: dict[str, Any], words: list[str]
) -> None:
    _edit(folder, change, config)
    with pytest.raises(UserError) as error:
        loaded(folder, world)
    assert all(word in str(error.value) for word in [str(folder), *words])


def test_a_tied_folder_may_hold_the_head_and_old_buffers(world: World, tmp_path: Path) -> None:
    source = save_llama(tmp_path / "source", tie_word_embeddings=True)
    embedding = HFFolder(source).read("model.embed_tokens.weight", ((0, 101), (0, 32)))
    buffer = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in (0, 1)}
    _edit(source, {"lm_head.weight": embedding.clone(), **buffer})
    model = loaded(source, world)
    assert torch.equal(model.head.weight, embedding)
    export_hf(model, tmp_path / "out", source, world)
    assert not {"lm_head.weight", *buffer} & set(HFFolder(tmp_path / "out"))


def test_nothing_is_overwritten(world: World, tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(UserError, match="out: exists and is not an empty folder"):
        export_hf(loaded(folder, world), out, folder, world)
    assert [path.name for path in out.iterdir()] == ["precious"]
    (out / "precious").unlink()
    export_hf(loaded(folder, world), out, folder, world)  # an empty folder is taken
    assert (out / "config.json").is_file()


class _Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_small_disk_is_refused_before_anything_is_written(
    world: World, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: _Usage(10, 9, 1))
    with pytest.raises(UserError, match="out: needs 0.00 GB, and the disk has 0.00 GB free"):
        export_hf(loaded(folder, world), tmp_path / "out", folder, world)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("a crash")])
def test_a_failure_halfway_leaves_nothing(
    world: World, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(hf_export, "write_index", fail)
    with pytest.raises(UserError if isinstance(error, OSError) else RuntimeError, match="disk is full|a crash"):
        export_hf(loaded(folder, world), tmp_path / "out", folder, world, max_shard_size=10_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_name_that_is_neither_folder_nor_reachable_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(folder) == folder
    with pytest.raises(UserError, match="./nowhere: no such model folder"):
        resolve("./nowhere")
    with pytest.raises(UserError, match="nobody/nothing: no such folder here, and not available as a hub id"):
        resolve("nobody/nothing")
