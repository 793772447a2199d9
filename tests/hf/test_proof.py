"""A folder that fusemega wrote is as it was written, or says what is not; what was read whole is not read again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash
from safetensors.torch import load_file

from fusemega.align.transplant import transplant
from fusemega.checkpoint.open_model import ModelConfig, ModelSource
from fusemega.convert.convert import export_megatron, import_hf
from fusemega.convert.verify import verify
from fusemega.errors import UserError
from fusemega.files import remembered
from fusemega.files.integrity import recorded_hashes
from fusemega.hf import folder as hf_folder
from fusemega.hf.cut_layers import cut_layers
from fusemega.hf.folder import HFFolder
from fusemega.hf.proof import check_written
from fusemega.runtime.parallel import ParallelConfig, World
from tests.checkpoint.conftest import save_llama
from tests.merge.conftest import entries, run_merge, write_tokenizer


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """An export, of several shards and with a tokenizer."""
    source = save_llama(tmp_path / "source")
    write_tokenizer(source, [f"t{i}" for i in range(101)])
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    import_hf(source, tmp_path / "megatron")
    export_megatron(tmp_path / "megatron", tmp_path / "written", max_shard_size=20_000)
    return tmp_path / "written"


def _flip(path: Path) -> None:
    """One bit of the last byte; size and modification time stay."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _load(folder: Path, out: Path, world: World) -> None:
    ModelSource(ModelConfig(load=str(folder), dtype="fp32"), ParallelConfig(), 1).build(world)


READERS: dict[str, Callable[[Path, Path, World], object]] = {
    "import": lambda folder, out, world: import_hf(folder, out),
    "load": _load,
    "merge": lambda folder, out, world: run_merge(out, merge_method="linear", models=entries([folder], weight=[1.0])),
    "transplant": lambda folder, out, world: transplant(folder, out, folder),
    "cut": lambda folder, out, world: cut_layers(folder, out, [0], world),
}


@pytest.mark.parametrize("reader", READERS)
def test_damaged_weights_are_refused(reader: str, written: Path, tmp_path: Path, world: World) -> None:
    out = tmp_path / "out"
    READERS[reader](written, out, world)
    if reader not in ("import", "load"):
        assert recorded_hashes(out).keys() == {path.name for path in out.iterdir()} - {"integrity.json"}
        check_written(HFFolder(out))
        shutil.rmtree(out)
    shard = sorted(written.glob("*.safetensors"))[1]
    _flip(shard)
    with pytest.raises(
        UserError, match=rf"{shard}: damaged, or written by another program: its hash differs from the one"
    ):
        READERS[reader](written, tmp_path / "again", world)
    assert not (tmp_path / "again").exists()
    assert verify(written, tmp_path / "source").damaged == [str(shard)]
    (written / "integrity.json").unlink()  # as the message says
    READERS[reader](written, tmp_path / "again", world)


def test_what_a_user_changed_is_named_and_taken(written: Path, capfd: pytest.CaptureFixture[str]) -> None:
    check_written(HFFolder(written))
    assert capfd.readouterr().err == ""
    (written / "README.md").write_text("a model")
    (written / ".git").mkdir()
    (written / "tokenizer_config.json").write_text("{}")
    (written / "chat_template.jinja").write_text("{{ messages }}")
    (written / "generation_config.json").unlink()
    check_written(HFFolder(written))
    assert capfd.readouterr().err == (
        f"warning: {written}: chat_template.jinja, generation_config.json, tokenizer_config.json: changed after "
        "fusemega wrote them (integrity.json); used as they are\n"
    )


def test_weights_that_are_not_listed_are_refused(written: Path) -> None:
    manifest = json.loads((written / "integrity.json").read_text())
    shard = min(name for name in manifest["files"] if name.endswith(".safetensors"))
    del manifest["files"][shard]
    (written / "integrity.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"{shard}: damaged, or written by another program"):
        check_written(HFFolder(written))


@pytest.mark.parametrize("chunk", [7, 4096, 1 << 22])
def test_one_reading_gives_the_hashes_of_files_and_tensors(
    chunk: int, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_folder, "_HASH_CHUNK_BYTES", chunk)
    hashes = HFFolder(written).hashes()
    assert sorted(hashes) == sorted(written.glob("*.safetensors"))
    for path, found in hashes.items():
        tensors = {name: xxhash.xxh3_128_hexdigest(value.numpy().tobytes()) for name, value in load_file(path).items()}
        assert found == {"file": xxhash.xxh3_128_hexdigest(path.read_bytes()), "tensors": tensors}


def test_weights_are_read_once_while_nobody_touches_them(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, hashing = list[Path](), hf_folder._shard_hashes

    def counting(shard: Path, entries: object) -> object:
        read.append(shard)
        return hashing(shard, entries)  # type: ignore[arg-type]

    monkeypatch.setattr(hf_folder, "_shard_hashes", counting)
    monkeypatch.setenv("FUSEMEGA_CACHE", str(tmp_path / "cache"))
    shards = sorted(written.glob("*.safetensors"))

    def asked() -> list[Path]:
        read.clear()
        HFFolder(written).content_hash()
        return sorted(read)

    assert asked() == shards
    assert asked() == shards, "written a moment ago: a change to come might not show"
    monkeypatch.setattr(remembered, "_SETTLED_SECONDS", -3600)
    assert asked() == shards and asked() == []
    before = HFFolder(written).content_hash()
    _flip(shards[0])  # of the same size and modification time
    assert HFFolder(written).content_hash() != before and read == [shards[0]]
    shutil.copy(shards[1], tmp_path / "copy")
    os.replace(tmp_path / "copy", shards[1])
    assert asked() == [shards[1]] and asked() == []
    for note in (tmp_path / "cache" / "hashes").iterdir():
        note.write_text("{")
    assert asked() == shards
