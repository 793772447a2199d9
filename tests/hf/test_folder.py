"""Damaged folders are refused by one line that names the file; sound ones are read box by box."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusemega.errors import UserError
from fusemega.hf.folder import INDEX_FILE, HFFolder


def _index(folder: Path) -> dict[str, dict[str, str]]:
    return json.loads((folder / INDEX_FILE).read_text())


def _set_index(folder: Path, name: str, file: str) -> None:
    index = _index(folder)
    index["weight_map"][name] = file
    (folder / INDEX_FILE).write_text(json.dumps(index))


def _truncate(folder: Path) -> None:
    shard = folder / "model-00002-of-00005.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])


def _lengthen(folder: Path) -> None:
    with (folder / "model-00002-of-00005.safetensors").open("ab") as file:
        file.write(b"\0")


def _garbage(folder: Path) -> None:
    (folder / "model-00002-of-00005.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0notjson!")


def _overlap(folder: Path) -> None:
    header = json.dumps({n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))


def _lying_shape(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))


def _pickle_only(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")


def _nothing(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()


def _stray_tensor(folder: Path) -> None:
    shard = folder / "model-00002-of-00005.safetensors"
    save_file(load_file(shard) | {"stray": torch.ones(1)}, shard)


def _config(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(text)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "model-00003-of-00005.safetensors").unlink(), ["model-00003-of-00005.safetensors: missing"]),
        (_truncate, ["model-00002-of-00005.safetensors: truncated", "header says"]),
        (_lengthen, ["model-00002-of-00005.safetensors: too long"]),
        (_garbage, ["model-00002-of-00005.safetensors: not a safetensors file"]),
        (lambda f: (f / "model-00002-of-00005.safetensors").write_bytes(b"123"), ["00002-of", "truncated"]),
        (_overlap, ["model.safetensors: corrupt header", "tensor b"]),
        (_lying_shape, ["model.safetensors: corrupt header", "tensor a"]),
        (lambda f: _set_index(f, "lm_head.weight", "gone.safetensors"), ["gone.safetensors: missing"]),
        (lambda f: _set_index(f, "lm_head.weight", "../x.safetensors"), [INDEX_FILE, "outside", "'../x.safetensors'"]),
        (lambda f: _set_index(f, "lm_head.weight", "/etc/passwd"), [INDEX_FILE, "outside", "'/etc/passwd'"]),
        (lambda f: _set_index(f, "extra", "model-00001-of-00005.safetensors"), ["does not hold tensor extra"]),
        (_stray_tensor, ["model-00002-of-00005.safetensors: holds tensor stray", "does not name it"]),
        (lambda f: (f / INDEX_FILE).write_text("{"), [f"{INDEX_FILE}:1: malformed JSON"]),
        (lambda f: (f / INDEX_FILE).write_text('{"weight_map": [1]}'), [INDEX_FILE, "weight_map"]),
        (_pickle_only, ["pytorch_model.bin", "pickled weights are refused", "safetensors"]),
        (_nothing, ["neither model.safetensors nor model.safetensors.index.json"]),
        (lambda f: (f / "config.json").unlink(), ["config.json: cannot read"]),
        (_config("[1]"), ["config.json: expected a JSON object, found a list"]),
        (_config('{"a": 1,\n}'), ["config.json:2: malformed JSON"]),
        (shutil.rmtree, ["no such model folder"]),
    ],
)
def test_damage_is_named(folder: Path, damage: Callable[[Path], object], words: list[str]) -> None:
    assert len(list(folder.glob("*.safetensors"))) == 5  # the names above
    damage(folder)
    with pytest.raises(UserError) as error:
        HFFolder(folder)
    message = str(error.value)
    assert str(folder) in message and "\n" not in message
    for word in words:
        assert word in message


def test_boxes_are_read_as_slices(folder: Path) -> None:
    source = HFFolder(folder)
    whole = {name: value for shard in folder.glob("*.safetensors") for name, value in load_file(shard).items()}
    assert source.keys() == sorted(whole)
    name = "model.layers.1.mlp.down_proj.weight"
    assert source.shape(name) == (32, 48) and source.dtype(name) is torch.float32
    assert torch.equal(source.read(name, ((3, 9), (10, 48))), whole[name][3:9, 10:48])
    assert torch.equal(source.read("model.norm.weight", ((5, 7),)), whole["model.norm.weight"][5:7])


def test_an_unknown_tensor_has_a_nearest_name(folder: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'model.norm.weight'"):
        HFFolder(folder).shape("model.norm.weigth")


def test_quantised_weights_are_refused_when_asked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.ones(2, 2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="tensor a is of type I8; supported: BF16, F16, F32, F64"):
        HFFolder(tmp_path).dtype("a")


def test_shards_of_a_hub_cache_are_links_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    shard = folder / "model-00001-of-00005.safetensors"
    shard.rename(tmp_path / "blob")
    shard.symlink_to("../blob")
    assert HFFolder(folder).keys()


def test_content_hash_is_of_the_function_not_of_the_files(folder: Path, tmp_path: Path) -> None:
    source = HFFolder(folder)
    merged = tmp_path / "merged"
    merged.mkdir()
    tensors = {name: value for shard in folder.glob("*.safetensors") for name, value in load_file(shard).items()}
    save_file(tensors, merged / "model.safetensors")
    (merged / "config.json").write_text(json.dumps(source.config | {"transformers_version": "0"}))
    assert HFFolder(merged).content_hash() == source.content_hash()
    (merged / "config.json").write_text(json.dumps(source.config | {"rms_norm_eps": 0.5}))
    assert HFFolder(merged).content_hash() != source.content_hash()
    (merged / "config.json").write_text(json.dumps(source.config))
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, merged / "model.safetensors")
    assert HFFolder(merged).content_hash() != source.content_hash()
