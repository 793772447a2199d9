"""The checkpoint's files as megatron-core and torch know them."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoConfig, AutoModelForCausalLM

from fusemega.checkpoint.megatron_folder import MegatronFolder
from fusemega.checkpoint.torch_dist import save_model
from fusemega.checkpoint.torch_dist_files import Checkpoint, empty_object, envelope
from fusemega.convert import convert
from fusemega.convert.convert import export_megatron, import_hf
from fusemega.errors import UserError
from fusemega.hf.folder import HFFolder
from fusemega.models.build import build_model, init_random
from fusemega.runtime.parallel import World
from fusemega.runtime.workers import peak_memory
from tests.checkpoint.conftest import SETTINGS


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe"])
def test_keys_shapes_and_objects_are_those_of_megatron_core(
    world: World, tmp_path: Path, model_type: str, tied: bool
) -> None:
    source = tmp_path / "source"
    # Layers that are alike are stacked, so a model with a dense layer among those with experts has other keys.
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    others = {"mixtral": {"num_local_experts": 4}, "qwen3_moe": experts | {"mlp_only_layers": [0] * tied}}
    config = AutoConfig.for_model(model_type, **SETTINGS, tie_word_embeddings=tied, **others.get(model_type, {}))
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(source)
    import_hf(source, tmp_path / "megatron")
    ours = FileSystemReader(tmp_path / "megatron" / "weights").read_metadata().state_dict_metadata
    state = build_model(HFFolder(source).architecture, world, torch.bfloat16).sharded_state_dict()
    apply_factories(state)
    theirs = list(nested_values(state))
    tensors = {value.key: value.global_shape for value in theirs if isinstance(value, ShardedTensor)}
    objects = {value.unique_key for value in theirs if isinstance(value, ShardedObject)}
    assert {key: tuple(value.size) for key, value in ours.items() if hasattr(value, "size")} == tensors
    assert {key for key, value in ours.items() if not hasattr(value, "size")} == objects
    assert all(value.properties.dtype is torch.bfloat16 for value in ours.values() if hasattr(value, "size"))
    export_megatron(tmp_path / "megatron", tmp_path / "out")
    assert HFFolder(tmp_path / "out").content_hash() == HFFolder(source).content_hash()


def test_the_small_files_are_those_of_megatron_core(world: World, tmp_path: Path, folder: Path) -> None:
    import_hf(folder, tmp_path / "megatron")
    model = build_model(HFFolder(folder).architecture, world, torch.float32)
    init_random(model, world, seed=0)
    (tmp_path / "saved").mkdir()
    save_model(model, tmp_path / "saved")
    ours = tmp_path / "megatron" / "weights"
    notes = [json.loads((path / "metadata.json").read_text()) for path in (ours, tmp_path / "saved")]
    assert notes[0] == notes[1]
    for path in (ours, tmp_path / "saved"):
        assert torch.load(path / "common.pt", weights_only=True) == {}


def test_an_entry_is_what_torch_save_writes() -> None:
    values = torch.arange(60, dtype=torch.bfloat16).view(1, 12, 5)
    head, tail = envelope((1, 12, 5), "bfloat16")
    loaded = torch.load(io.BytesIO(head + values.view(torch.uint8).numpy().tobytes() + tail), weights_only=True)
    assert torch.equal(loaded, values) and loaded.dtype is torch.bfloat16 and loaded.is_contiguous()
    assert torch.load(io.BytesIO(empty_object()), weights_only=True) == [None]
    before = peak_memory()
    large = envelope((1 << 14, 1 << 16), "float32")  # 4 GiB of address space, of which nothing is touched
    assert sum(map(len, large)) < 5000 and peak_memory() - before < 1 << 28


@pytest.mark.parametrize("chunk_bytes", [100, 1000])
def test_parameters_cut_into_chunks_load_whole(
    world: World, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(convert, "CHUNK_BYTES", chunk_bytes)
    import_hf(folder, tmp_path / "megatron")
    sizes = [
        len(value.chunks)
        for value in FileSystemReader(tmp_path / "megatron/weights").read_metadata().state_dict_metadata.values()
        if hasattr(value, "chunks")
    ]
    assert max(sizes) > 10
    model = MegatronFolder(tmp_path / "megatron").load(world)
    source = HFFolder(folder)
    layer = model.chunks[0].decoder.layers[1]
    gate, up = (source.read(f"model.layers.1.mlp.{name}_proj.weight", ((0, 48), (0, 32))) for name in ("gate", "up"))
    assert torch.equal(layer.mlp.linear_fc1.weight, torch.cat([gate, up]))
    assert torch.equal(model.head.weight, source.read("lm_head.weight", ((0, 101), (0, 32))))


class _Malicious:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


@pytest.mark.parametrize("payload", [_Malicious(), torch.load, torch.nn.Linear])
def test_an_index_cannot_run_code(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, payload: object
) -> None:
    import_hf(folder, tmp_path / "megatron")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "megatron/weights/.metadata").write_bytes(pickle.dumps({"a": payload}))
    with pytest.raises(UserError, match=r"\.metadata: not an index of a torch_dist checkpoint: it names "):
        Checkpoint(tmp_path / "megatron/weights")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("damage", ["half", "nothing", "other"])
def test_a_damaged_index_or_chunk_is_named(tmp_path: Path, folder: Path, damage: str) -> None:
    import_hf(folder, tmp_path / "megatron")
    weights = tmp_path / "megatron/weights"
    index, chunks = weights / ".metadata", weights / "__0_0.distcp"
    if damage == "half":
        index.write_bytes(index.read_bytes()[:200])
        message = r"\.metadata: not an index"
    elif damage == "nothing":
        chunks.unlink()
        message = r"__0_0.distcp: cannot read: No such file"
    else:
        chunks.write_bytes(chunks.read_bytes()[: chunks.stat().st_size // 2])
        message = r"__0_0.distcp: truncated or damaged at "
    with pytest.raises(UserError, match=message):
        Checkpoint(weights)
