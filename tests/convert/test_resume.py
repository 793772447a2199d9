"""Conversions that are killed, refused or out of disk: complete or not at all, and bitwise the same when they go on."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from fusemega.convert import convert
from fusemega.convert.convert import export_megatron, import_hf
from fusemega.convert.verify import verify
from fusemega.errors import UserError
from fusemega.files.unfinished import Unfinished
from tests.checkpoint.conftest import save_llama

ROOT = Path(__file__).resolve().parents[2]

# Converts with small items; after the third is journalled, this process dies as by `kill -9`, in the middle of others.
KILLED = """
import multiprocessing, os, pathlib, signal, sys

def main():
    from fusemega.convert import convert
    from fusemega.files.unfinished import Unfinished
    convert.ITEM_TARGET_BYTES = 9000
    record = Unfinished.record
    def record_and_die(self, name, result):
        record(self, name, result)
        if len(self.finished) == 3:
            pids = [str(child.pid) for child in multiprocessing.active_children()]
            pathlib.Path(sys.argv[5]).write_text(" ".join(pids))
            os.kill(os.getpid(), signal.SIGKILL)
    Unfinished.record = record_and_die
    getattr(convert, sys.argv[1])(sys.argv[2], sys.argv[3], workers=int(sys.argv[4]))

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def small_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "ITEM_TARGET_BYTES", 9000)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _kill_in_the_middle(work: Path, function: str, source: Path, out: Path, workers: int) -> None:
    script, pids = work / "killed.py", work / "pids"
    script.write_text(KILLED)
    command = [sys.executable, str(script), function, str(source), str(out), str(workers), str(pids)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists() and (out.parent / f".{out.name}.incomplete").is_dir()
    children = [int(pid) for pid in pids.read_text().split()]
    assert len(children) == (workers if workers > 1 else 0)
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in children):
        assert time.monotonic() < deadline, "processes of a killed conversion live on"
        time.sleep(0.05)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("function", ["import_hf", "export_megatron"])
@pytest.mark.usefixtures("small_items")
def test_a_killed_conversion_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, workers: int
) -> None:
    source = save_llama(tmp_path / "hf", torch.bfloat16)
    if function == "export_megatron":
        import_hf(source, tmp_path / "megatron")
        source = tmp_path / "megatron"
    run = getattr(convert, function)
    whole = run(source, tmp_path / "whole")
    _kill_in_the_middle(tmp_path, function, source, tmp_path / "out", workers)
    made: list[str] = []
    record = Unfinished.record

    def record_and_note(self: Unfinished, name: str, result: object) -> None:
        made.append(name)
        record(self, name, result)

    monkeypatch.setattr(Unfinished, "record", record_and_note)
    resumed = run(source, tmp_path / "out", workers=workers, resume=True)
    assert _contents(tmp_path / "out") == _contents(tmp_path / "whole")
    assert len(made) >= 1 and 0 < resumed.byte_count < whole.byte_count
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.usefixtures("small_items")
def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path, workers: int) -> None:
    source = save_llama(tmp_path / "hf", tie_word_embeddings=True)
    import_hf(source, tmp_path / "one")
    report = import_hf(source, tmp_path / "some", workers=workers)
    assert _contents(tmp_path / "some") == _contents(tmp_path / "one")
    assert report.processes == (1 if workers == 1 else 1 + workers)
    export_megatron(tmp_path / "one", tmp_path / "out-one", max_shard_size=20_000)
    export_megatron(tmp_path / "some", tmp_path / "out-some", max_shard_size=20_000, workers=workers)
    assert _contents(tmp_path / "out-some") == _contents(tmp_path / "out-one")
    assert verify(source, tmp_path / "out-some", workers=workers).identical
    assert len(list((tmp_path / "one" / "weights").glob("*.distcp"))) > 5


def _begin(monkeypatch: pytest.MonkeyPatch, source: Path, out: Path) -> Path:
    """Interrupts an import after two items; the place of what is left."""
    record = Unfinished.record

    def interrupted(self: Unfinished, name: str, result: object) -> None:
        record(self, name, result)
        if len(self.finished) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Unfinished, "record", interrupted)
        with pytest.raises(KeyboardInterrupt):
            import_hf(source, out)
    return out.parent / f".{out.name}.incomplete"


@pytest.mark.usefixtures("small_items")
@pytest.mark.parametrize("touched", [True, False])
def test_another_source_is_not_continued(touched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_llama(tmp_path / "hf")
    place = _begin(monkeypatch, source, tmp_path / "out")
    before = _contents(place)
    weights = source / "model-00001-of-00005.safetensors"
    times = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
    if touched:
        os.utime(weights)
    else:  # as by a tool that sets the time of the file that it copies
        weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
        os.utime(weights, ns=times)
    with pytest.raises(UserError, match=r"\.out.incomplete: was started from other files or with other options"):
        import_hf(source, tmp_path / "out", resume=True)
    assert _contents(place) == before
    import_hf(source, tmp_path / "out")
    assert verify(source, tmp_path / "out").identical and not place.exists()


@pytest.mark.usefixtures("small_items")
def test_what_a_crash_tore_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a journal line; an item that was finished and whose file is too short or gone."""
    source = save_llama(tmp_path / "hf")
    import_hf(source, tmp_path / "whole")
    place = _begin(monkeypatch, source, tmp_path / "out")
    with open(place / "journal.jsonl", "a") as journal:
        journal.write('["weights/__0_4.dis')
    first, second = sorted((place / "out" / "weights").glob("*.distcp"))
    first.write_bytes(first.read_bytes()[:-10])
    second.unlink()
    report = import_hf(source, tmp_path / "out", resume=True)
    assert _contents(tmp_path / "out") == _contents(tmp_path / "whole")
    assert report.byte_count == sum(p.stat().st_size for p in (tmp_path / "out" / "weights").glob("*.distcp"))


def test_resume_without_anything_begun_starts(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "hf")
    import_hf(source, tmp_path / "out", resume=True)
    assert verify(source, tmp_path / "out").identical


@contextlib.contextmanager
def _disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_too_small_is_refused_at_once(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "hf")
    with _disk(tmp_path / "disk", "64k"):
        with pytest.raises(UserError, match="out: needs 0.00 GB, and the disk has 0.00 GB free"):
            import_hf(source, tmp_path / "disk" / "out")
        assert list((tmp_path / "disk").iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.usefixtures("small_items")
def test_a_disk_that_fills_up_in_the_middle(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was finished stays, to go on with when there is room. Of two workers both may be in the middle of a file."""
    source = save_llama(tmp_path / "hf")
    whole = import_hf(source, tmp_path / "whole")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 40))  # it fills up after the check
    with _disk(tmp_path / "disk", "72k"):
        out = tmp_path / "disk" / "out"
        with pytest.raises(UserError, match=r"out: the disk is full$"):
            import_hf(source, out, workers=workers)
        finished = sum(p.stat().st_size for p in out.parent.glob(".out.incomplete/out/weights/*.distcp"))
        assert not out.exists() and (finished or workers > 1)
        subprocess.run(["mount", "-o", "remount,size=4M", str(out.parent)], check=True)
        report = import_hf(source, out, workers=workers, resume=True)
        assert (report.byte_count < whole.byte_count) == bool(finished)
        assert _contents(out) == _contents(tmp_path / "whole")


def test_a_limit_on_file_sizes_is_a_line_and_not_a_traceback(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "hf")
    command = [sys.executable, "-m", "fusemega", "convert", "import", str(source), str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--workers", "2"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"error: {tmp_path / 'out'}: a file grew larger than this process")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_tied_head_that_differs_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = save_llama(tmp_path / "hf", max_shard_size="1GB", tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    for changed in (False, True):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][100, 31] += 1 if changed else 0
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        if not changed:
            import_hf(source, tmp_path / "same", workers=2)
            assert verify(source, tmp_path / "same").identical
    with pytest.raises(UserError, match="ties the head to the embedding, but lm_head.weight differs from model.embed"):
        import_hf(source, tmp_path / "out", workers=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "same"]


@pytest.mark.parametrize("where", ["an entry's end", "a weight"])
def test_verify_finds_any_flipped_bit_of_a_megatron_folder(tmp_path: Path, where: str) -> None:
    source = save_llama(tmp_path / "hf")
    import_hf(source, tmp_path / "megatron")
    path = tmp_path / "megatron" / "weights" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[-1 if where == "an entry's end" else 2000] ^= 1
    path.write_bytes(data)
    for pair in ((source, tmp_path / "megatron"), (tmp_path / "megatron", source)):
        result = verify(*pair, workers=2)
        assert result.damaged == [str(path)] and not result.identical
        assert bool(result.different) == (where == "a weight")


def test_verify_takes_any_pair(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "hf", torch.bfloat16)
    other = save_llama(tmp_path / "wide", torch.float32)
    for folder, out in ((source, "a"), (source, "b"), (other, "c")):
        import_hf(folder, tmp_path / out)
    assert verify(tmp_path / "a", tmp_path / "b").identical
    assert verify(tmp_path / "a", source).identical
    assert len(verify(tmp_path / "a", tmp_path / "c").different) == 21


@pytest.mark.usefixtures("small_items")
def test_a_journaled_part_that_was_changed_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = save_llama(tmp_path / "hf"), tmp_path / "out"
    _kill_in_the_middle(tmp_path, "import_hf", source, out, workers=1)
    part = next((tmp_path / ".out.incomplete" / "out" / "weights").glob("__0_*.distcp"))
    part.write_bytes(bytes(part.stat().st_size))
    import_hf(source, out, resume=True)
    assert f"part weights/{part.name}@0 was changed after it was written; making it again" in capsys.readouterr().err
    assert verify(source, out).identical


def test_one_flipped_byte_is_not_exported(tmp_path: Path) -> None:
    source, megatron = save_llama(tmp_path / "hf"), tmp_path / "megatron"
    import_hf(source, megatron)
    file = megatron / "weights" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"__0_0\.distcp: damaged: its hash differs from the one"):
        export_megatron(megatron, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]
