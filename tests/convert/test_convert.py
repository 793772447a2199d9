"""Import, export and verify in one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusemega.checkpoint.megatron_folder import MegatronFolder
from fusemega.convert import convert
from fusemega.convert.convert import export_megatron, import_hf
from fusemega.convert.verify import logit_difference, verify
from fusemega.errors import UserError
from fusemega.files.integrity import write_integrity
from fusemega.hf.folder import HFFolder
from fusemega.models.build import init_random
from fusemega.runtime.parallel import World
from tests.checkpoint.conftest import save_llama
from tests.merge.conftest import write_tokenizer


def _change(folder: Path, name: str, new: torch.Tensor | None) -> None:
    """Replaces a tensor in the shard that holds it."""
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            if new is not None:
                tensors[name] = new
            else:
                flat = tensors[name].view(torch.uint8).flatten()
                flat[5] ^= 1
            save_file(tensors, shard, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_there_and_back_is_bitwise_and_one_flipped_bit_is_found(tmp_path: Path, dtype: torch.dtype) -> None:
    source = save_llama(tmp_path / "source", dtype, tie_word_embeddings=True)
    import_hf(source, tmp_path / "megatron")
    export_megatron(tmp_path / "megatron", tmp_path / "out")
    for other in ("megatron", "out"):
        result = verify(source, tmp_path / other)
        assert result.identical and result.tensors == 20
    _change(source, "model.layers.1.self_attn.k_proj.weight", None)
    for other in ("megatron", "out"):
        result = verify(source, tmp_path / other)
        assert result.different == ["model.layers.1.self_attn.k_proj.weight"]
        assert not result.identical


def test_mixed_dtypes_come_back_as_they_were(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "source", torch.bfloat16)
    _change(source, "model.norm.weight", torch.linspace(0, 1, 32, dtype=torch.float32))
    import_hf(source, tmp_path / "megatron")
    export_megatron(tmp_path / "megatron", tmp_path / "out")
    assert HFFolder(tmp_path / "out").dtype("model.norm.weight") is torch.float32
    assert HFFolder(tmp_path / "out").dtype("lm_head.weight") is torch.bfloat16
    assert verify(source, tmp_path / "out").identical
    assert verify(source, tmp_path / "megatron").identical


def test_a_wider_copy_is_different_between_hf_folders(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "source", torch.bfloat16)
    import_hf(source, tmp_path / "megatron")
    export_megatron(tmp_path / "megatron", tmp_path / "out", dtype=torch.float32)
    assert len(verify(source, tmp_path / "out").different) == 21


def test_another_depth_is_missing_tensors(tmp_path: Path, folder: Path) -> None:
    import_hf(folder, tmp_path / "megatron")
    shallow = save_llama(tmp_path / "shallow", num_hidden_layers=1)
    for other in (folder, tmp_path / "megatron"):
        result = verify(shallow, other)
        assert len(result.missing) == 9 and all("layers.1." in name for name in result.missing)


def test_the_megatron_folder_stands_alone(world: World, tmp_path: Path, folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    import_hf(folder, tmp_path / "megatron")
    opened = MegatronFolder(tmp_path / "megatron")
    assert opened.manifest["source_hash"] == HFFolder(folder).content_hash()
    assert opened.config == HFFolder(folder).config
    assert (opened.hf / "tokenizer.json").is_file()
    model = opened.load(world, torch.bfloat16)
    name = "model.layers.0.mlp.down_proj.weight"
    whole = HFFolder(folder).read(name, ((0, 32), (0, 48)))
    assert torch.equal(model.chunks[0].decoder.layers[0].mlp.linear_fc2.weight, whole.to(torch.bfloat16))
    init_random(model, world, seed=1)
    assert not torch.equal(model.chunks[0].decoder.layers[0].mlp.linear_fc2.weight, whole.to(torch.bfloat16))


def test_an_export_keeps_the_files_and_says_what_does_not_fit(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(convert, "say", said.append)
    for name, tokens, words in (
        ("fits", 101, []),
        (
            "longer",
            103,
            [f"{tmp_path}/longer.megatron: the tokenizer has 103 ids, the model 101 rows: none for 't101' and after"],
        ),
        ("damaged", 0, [f"{tmp_path}/damaged.megatron/hf/tokenizer.json: 3 is not an added token; kept as it is"]),
    ):
        write_tokenizer(folder, [f"t{i}" for i in range(tokens or 1)])
        if not tokens:
            (folder / "tokenizer.json").write_text('{"added_tokens": [3]}')
        import_hf(folder, tmp_path / f"{name}.megatron")
        said.clear()
        export_megatron(tmp_path / f"{name}.megatron", tmp_path / name)
        assert (tmp_path / name / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
        assert said == words


def test_equal_weights_under_another_configuration_are_not_identical(tmp_path: Path, folder: Path) -> None:
    import_hf(folder, tmp_path / "megatron")
    export_megatron(tmp_path / "megatron", tmp_path / "out")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-5, "transformers_version": "0"}))
    for other in ("megatron", "out"):
        result = verify(folder, tmp_path / other)
        assert (result.different, result.missing, result.config) == ([], [], ["rms_norm_eps"])
        assert not result.identical


def test_an_output_that_exists_is_refused_before_the_weights_are_read(tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    (folder / "model-00001-of-00005.safetensors").unlink()
    for conversion in (import_hf, export_megatron):
        with pytest.raises(UserError, match="out: exists and is not an empty folder"):
            conversion(folder, out)


@pytest.mark.parametrize(
    ("manifest", "words"),
    [(None, ["manifest.json: cannot read"]), ({"format": "other"}, ["format is 'other'", "fusemega-megatron-2"])],
)
def test_what_is_not_a_megatron_folder(tmp_path: Path, manifest: dict[str, Any] | None, words: list[str]) -> None:
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError) as error:
        export_megatron(tmp_path, tmp_path / "out")
    assert all(word in str(error.value) for word in words)
    assert not (tmp_path / "out").exists()


def test_weights_of_another_shape_are_named(world: World, tmp_path: Path, folder: Path) -> None:
    import_hf(folder, tmp_path / "megatron")
    config = tmp_path / "megatron" / "hf" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 64}))
    with pytest.raises(UserError, match=r"hf/config.json: truncated: \d+ bytes, and integrity.json says"):
        MegatronFolder(tmp_path / "megatron")
    write_integrity(tmp_path / "megatron")
    with pytest.raises(UserError, match="weights: does not fit this model"):
        MegatronFolder(tmp_path / "megatron").load(world)
    with pytest.raises(UserError, match=r"linear_fc1.weight is of shape \[2, 96, 32\], .* \[2, 128, 32\]"):
        export_megatron(tmp_path / "megatron", tmp_path / "out")
    (tmp_path / "megatron" / "weights" / "metadata.json").unlink()
    with pytest.raises(UserError, match="weights/metadata.json: listed in integrity.json"):
        MegatronFolder(tmp_path / "megatron")
    write_integrity(tmp_path / "megatron")
    with pytest.raises(UserError, match="weights: not a Megatron distributed checkpoint"):
        MegatronFolder(tmp_path / "megatron").load(world)


def test_logits_on_a_text(world: World, tmp_path: Path, smollm2_folder: Path) -> None:
    import_hf(smollm2_folder, tmp_path / "megatron")
    result = verify(smollm2_folder, tmp_path / "megatron", workers=2)
    assert result.identical and result.tensors == 272
    difference = logit_difference(smollm2_folder, tmp_path / "megatron", world, "The capital of France is")
    assert 0 <= difference < 1e-4
    changed = shutil.copytree(smollm2_folder, tmp_path / "changed")
    _change(changed, "model.norm.weight", torch.ones(576, dtype=torch.bfloat16))
    assert logit_difference(tmp_path / "megatron", changed, world, "The capital of France is") > 1


@pytest.mark.parametrize(
    ("tool", "message"),
    [("hf_to_megatron", "no such model folder"), ("megatron_to_hf", "manifest.json: cannot read: No such file")],
)
def test_tools_are_the_commands(tmp_path: Path, tool: str, message: str) -> None:
    root = Path(__file__).resolve().parents[2]
    env = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, root / "tools" / f"{tool}.py", tmp_path / "absent", tmp_path / "out"]
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    assert run.returncode == 2, run.stderr
    assert message in run.stderr and str(tmp_path / "absent") in run.stderr and "Traceback" not in run.stderr
    assert list(tmp_path.iterdir()) == []
