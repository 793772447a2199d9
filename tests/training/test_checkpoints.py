"""Checkpoints that survive: damage, hostile files, saves in the background, other settings on resume."""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from fusemega.checkpoint import saver as saver_module
from fusemega.checkpoint.index_file import read_index
from fusemega.checkpoint.series import (
    find_checkpoint,
    latest_checkpoint,
    make_way,
    prune_checkpoints,
    remove_leftovers,
)
from fusemega.checkpoint.torch_dist import check_files, load_model
from fusemega.errors import UserError
from fusemega.files.integrity import FILE, damaged_files, file_hash, recorded_hashes, write_integrity
from fusemega.files.owned import mark_scratch
from fusemega.runtime.parallel import ParallelConfig, initialize
from fusemega.training.assembly import open_trainer, train
from fusemega.training.checkpoints import Checkpoints
from fusemega.training.records import COSTS, read_metrics
from fusemega.training.run_file import TrainRun
from fusemega.training.trainer import Trainer

MakeRun = Callable[..., TrainRun]
TRACKER = "latest_checkpointed_iteration.txt"


def curve(folder: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if key not in COSTS} for row in read_metrics(folder)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def run(make_run: MakeRun, finished: Path, tmp_path: Path) -> TrainRun:
    """Finished, with checkpoints after iterations 2 and 4."""
    if not finished.exists():
        train(make_run(output_dir=str(finished), training={"save_interval": 2}))
    shutil.copytree(finished, tmp_path / "run")
    return make_run(training={"save_interval": 2})


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a part cut": (lambda root: os.truncate(root / "iter_0000004" / "__0_0.distcp", 100), "__0_0.distcp: truncated"),
    "a part gone": (lambda root: (root / "iter_0000004" / "__0_1.distcp").unlink(), "__0_1.distcp: listed in"),
    "a bit flipped": (
        lambda root: flip(root / "iter_0000004" / "__0_1.distcp"),
        "its hash differs from the one recorded",
    ),
    "no state": (lambda root: (root / "iter_0000004" / "state.json").unlink(), "state.json: listed in integrity.json"),
    "no manifest": (lambda root: (root / "iter_0000004" / FILE).unlink(), "integrity.json: cannot read"),
    "gone": (lambda root: shutil.rmtree(root / "iter_0000004"), "names iteration '4', which is not there"),
    "another tracker": (lambda root: (root / TRACKER).write_text("7"), "names iteration '7', which is not there"),
    "no tracker": (lambda root: (root / TRACKER).unlink(), "latest_checkpointed_iteration.txt: missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(run: TrainRun, damage: str, capfd: pytest.CaptureFixture[str]) -> None:
    root = Path(run.output_dir) / "checkpoints"
    wanted = curve(root.parent)
    change, words = DAMAGE[damage]
    change(root)
    left = 4 if "tracker" in damage else 2
    found = find_checkpoint(root, initialize(ParallelConfig()))
    assert found is not None and found.name == f"iter_{left:07d}"
    said = capfd.readouterr()
    line = next(line for line in (said.out + said.err).splitlines() if "warning" in line)
    assert words in line and line.endswith(f"resuming from {found.name}")
    if damage == "a bit flipped":  # the whole way: what was lost is done again
        assert train(run) == 0
        assert curve(root.parent) == wanted and damaged_files(root / "iter_0000004") == []


def test_the_tracker_is_obeyed(run: TrainRun) -> None:
    root = Path(run.output_dir) / "checkpoints"
    (root / TRACKER).write_text("2")
    assert latest_checkpoint(root) == root / "iter_0000002"


def test_none_whole(run: TrainRun) -> None:
    root = Path(run.output_dir) / "checkpoints"
    flip(root / "iter_0000002" / "common.pt")
    flip(root / "iter_0000004" / ".metadata")
    assert latest_checkpoint(root) is not None  # by their sizes
    with pytest.raises(
        UserError, match=r"no complete checkpoint .*iter_0000004/.metadata: damaged.*iter_0000002/common"
    ):
        train(run)
    for folder in root.glob("iter_*"):
        (folder / "state.json").write_text("")
    with pytest.raises(UserError, match="no complete checkpoint to resume from: .*iter_0000004/state.json: truncated"):
        latest_checkpoint(root)


def test_retention_looks_no_further_than_the_newest_save(tmp_path: Path) -> None:
    """Checkpoints from before the run went back are not counted, nor taken for newer."""
    for iteration in (2, 4, 6, 8):
        (tmp_path / f"iter_{iteration:07d}").mkdir()
    prune_checkpoints(tmp_path, keep=1, newest=6, also=tmp_path / "iter_0000002")
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["2", "6", "8"]
    prune_checkpoints(tmp_path, keep=1, newest=6, also=None)
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["6", "8"]


def test_the_manifest_has_every_file(run: TrainRun) -> None:
    folder = Path(run.output_dir) / "checkpoints" / "iter_0000004"
    hashes = recorded_hashes(folder)
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert hashes.keys() == there - {FILE}
    megatrons = {"__0_0.distcp", "__0_1.distcp", ".metadata", "common.pt", "metadata.json"}
    ours = {"state.json", "manifest.json", "hf/config.json", "hf/tokenizer.json"}
    assert megatrons | ours <= hashes.keys()
    assert all(file_hash(folder / name) == digest for name, digest in hashes.items())


class _Payload:
    """Pickles as a call of os.system."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> Any:
        return os.system, (self._command,)


@pytest.mark.parametrize("file", [".metadata", "common.pt", "__0_0.distcp"])
@pytest.mark.parametrize("forced", [False, True], ids=["", "weights_only forced off"])
def test_nothing_in_a_checkpoint_is_run(
    run: TrainRun, tmp_path: Path, file: str, forced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forger also writes integrity.json anew."""
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    trap = tmp_path / "executed"
    payload = _Payload(f"touch {trap}")
    folder = Path(run.output_dir) / "checkpoints" / "iter_0000004"
    trainer, _ = open_trainer(run)
    if file == ".metadata":
        (folder / file).write_bytes(pickle.dumps(payload))
    elif file == "common.pt":
        torch.save({"optimizer": payload}, folder / file)
    else:
        stored = io.BytesIO()
        torch.save(payload, stored)
        index = read_index(folder / ".metadata")
        content = bytearray((folder / file).read_bytes())
        for where in index.storage_data.values():
            if where.relative_path == file and where.length >= len(stored.getvalue()):
                content[where.offset : where.offset + where.length] = stored.getvalue().ljust(where.length, b"\0")
        (folder / file).write_bytes(content)
    write_integrity(folder)
    shutil.rmtree(folder.parent / "iter_0000002")
    with pytest.raises(UserError, match=r"iter_0000004.*: (.*it names posix.system, which no|.*[Pp]ickle|.*archive)"):
        train(run)
    with pytest.raises(UserError):
        load_model(trainer.gpt, folder)
    assert not trap.exists()
    if file == "common.pt":  # the trap works
        torch.load(folder / file, weights_only=False)
        assert trap.exists()


@pytest.mark.parametrize("name", ["os.system", "pickle.loads", "nothing.at.all"])
def test_an_index_does_not_lead_into_other_modules(tmp_path: Path, name: str) -> None:
    """A dotted name would be followed through a module that is allowed."""
    module = "torch.distributed.checkpoint.filesystem"
    program = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(x)]) + x.encode() for x in (module, name)) + b"\x93."
    (tmp_path / ".metadata").write_bytes(program)
    with pytest.raises(UserError, match=f"it names {module}.{name}, which no index of tensors needs"):
        read_index(tmp_path / ".metadata")


def test_another_backend_is_refused(run: TrainRun) -> None:
    folder = Path(run.output_dir) / "checkpoints" / "iter_0000004"
    (folder / "metadata.json").write_text((folder / "metadata.json").read_text().replace("torch_dist", "zarr"))
    with pytest.raises(UserError, match=r"metadata.json: describes the format .*zarr.*, expected .*torch_dist"):
        check_files(folder)


def test_saves_in_the_background_change_nothing(make_run: MakeRun, tmp_path: Path) -> None:
    """Also while a slow disk keeps the next saves waiting."""
    settings = {"train_iters": 6, "save_interval": 2, "export_hf": True}
    for name in ("sync", "async"):
        run = make_run(output_dir=str(tmp_path / name), training={**settings, "async_save": name == "async"})
        assert train(run) == 0
    assert curve(tmp_path / "sync") == curve(tmp_path / "async")
    for iteration in (2, 4, 6):
        folders = [tmp_path / name / "checkpoints" / f"iter_{iteration:07d}" for name in ("sync", "async")]
        assert not damaged_files(folders[1])
        sync, background = (recorded_hashes(folder) for folder in folders)
        assert all(sync[name] == background[name] for name in ("__0_0.distcp", "__0_1.distcp", "common.pt"))
    assert not list((tmp_path / "async" / "checkpoints").glob("*.tmp"))
    weights = [(tmp_path / name / "hf" / "model.safetensors").read_bytes() for name in ("sync", "async")]
    assert weights[0] == weights[1]


def test_training_goes_on_while_a_save_is_written(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is the state at the time of the save, however late it is written."""
    gate = tmp_path / "gate"
    write = saver_module._write_and_hash

    def gated(*args: Any) -> None:
        while not gate.exists():
            pass
        write(*args)

    trainer, _ = open_trainer(make_run(output_dir=str(tmp_path / "sync")))
    sync = [trainer.step(), trainer.callback(Checkpoints).save(trainer), trainer.step()][1]
    monkeypatch.setattr(saver_module, "_write_and_hash", gated)
    trainer, _ = open_trainer(make_run(training={"async_save": True}))
    trainer.step()
    folder = trainer.callback(Checkpoints).save(trainer)
    trainer.step()
    trainer.callback(Checkpoints).saver.poll()
    assert trainer.iteration == 2 and not folder.exists() and latest_checkpoint(folder.parent) is None
    gate.touch()
    trainer.callback(Checkpoints).saver.wait()
    assert latest_checkpoint(folder.parent) == folder
    for name in ("__0_0.distcp", "__0_1.distcp"):
        assert (folder / name).read_bytes() == (sync / name).read_bytes()


def test_a_save_in_the_background_that_fails_is_one_line(make_run: MakeRun, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        run = make_run(output_dir=str(disk / "run"), training={"save_interval": 2, "async_save": True})
        with pytest.raises(UserError, match=r"iter_0000004: checkpoint not saved: the disk is full$"):
            train(run)
        root = disk / "run" / "checkpoints"
        assert sorted(path.name for path in root.iterdir()) == ["iter_0000002", TRACKER]
    finally:
        subprocess.run(["umount", "-l", str(disk)], capture_output=True)


def test_a_loss_that_is_not_finite_leaves_the_save_before_it(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step

    def failing(trainer: Trainer) -> dict[str, float]:
        if trainer.iteration == 2:
            raise UserError("iteration 3: the loss is not finite")
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", failing)
    run = make_run(training={"save_interval": 2, "async_save": True})
    with pytest.raises(UserError, match="the loss is not finite"):
        train(run)
    found = latest_checkpoint(Path(run.output_dir) / "checkpoints")
    assert found is not None and found.name == "iter_0000002"


def test_a_folder_that_is_not_shared(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another node wrote to a disk of its own is not there for the main process."""
    write = saver_module._write_and_hash

    def elsewhere(*args: Any) -> None:
        write(*args)
        next(args[1].glob("*.distcp")).unlink()

    monkeypatch.setattr(saver_module, "_write_and_hash", elsewhere)
    with pytest.raises(UserError, match="checkpoint.*distcp: .*need an output_dir that all nodes share"):
        train(make_run())


@pytest.mark.parametrize("async_save", [False, True])
def test_a_save_leaves_no_process_and_no_unfinished_file(make_run: MakeRun, async_save: bool) -> None:
    trainer, _ = open_trainer(make_run(training={"async_save": async_save}))
    trainer.step()
    before = psutil.Process().children(recursive=True)
    root = Path(trainer.run.output_dir) / "checkpoints"
    (root / "iter_0000001.1f0a6c2e.tmp").mkdir(parents=True)  # as a killed run leaves them
    mark_scratch(root / "iter_0000003.1f0a6c2e.tmp")
    (root / "iter_0000003.1f0a6c2e.tmp" / "out").mkdir()
    (root / f"{TRACKER}.1f0a6c2e.tmp").touch()
    trainer.save()
    trainer.callback(Checkpoints).saver.wait()
    assert psutil.Process().children(recursive=True) == before
    assert latest_checkpoint(root) is not None and sorted(os.listdir(root)) == ["iter_0000001", TRACKER]


def test_files_of_others_among_the_checkpoints_stay(run: TrainRun, capfd: pytest.CaptureFixture[str]) -> None:
    root = Path(run.output_dir) / "checkpoints"
    (root / "iter_mine.tmp").mkdir()
    theirs = [root / "iter_mine.tmp" / "notes", root / f"{TRACKER}.mine.tmp", root / f"{TRACKER}.1f0a6c2e.tmp"]
    theirs += [root / "iter_0000002" / "notes", root / "iter_0000004" / "notes"]
    for path in theirs:
        path.write_text("mine")
    remove_leftovers(root)
    prune_checkpoints(root, keep=1, newest=4, also=None)
    assert f"{root / 'iter_0000002'}: kept, because its integrity.json does not list notes" in capfd.readouterr().err
    assert all(path.read_text() == "mine" for path in theirs)
    make_way(root / "iter_0000004")
    (aside,) = root.glob("iter_0000004*")
    assert re.fullmatch(r"iter_0000004\.aside-[0-9a-f]{8}", aside.name) and (aside / "notes").read_text() == "mine"
    assert f"{root / 'iter_0000004'}: has files that its integrity.json does not list" in capfd.readouterr().err
    (root / "iter_0000002" / "notes").unlink()
    make_way(root / "iter_0000002")
    assert not (root / "iter_0000002").exists()


def test_a_writer_that_is_killed(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver_module, "_write_and_hash", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="checkpoint not saved: the process that writes it was ended from outside"):
        train(make_run(training={"async_save": True}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"dtype": "bf16"}}, "the checkpoint has dtype = fp32, this run bf16"),
        ({"training": {"seed": 3}}, "the checkpoint has training"),
        ({"training": {"global_batch_size": 3}}, "cannot resume"),
        ({"optimizer": {"use_distributed_optimizer": False}}, "the checkpoint has optimizer"),
    ],
)
def test_what_decides_the_curve_may_not_change(
    run: TrainRun, make_run: MakeRun, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        open_trainer(make_run(**change))


def test_micro_batches_and_packing_may_change(run: TrainRun, make_run: MakeRun) -> None:
    root = Path(run.output_dir) / "checkpoints"
    wanted = curve(root.parent)
    (root / TRACKER).write_text("2")
    assert train(make_run(training={"micro_batch_size": 2, "packing": False})) == 0
    for row, other in zip(curve(root.parent), wanted, strict=True):
        assert row["lm loss"] == pytest.approx(other["lm loss"], rel=1e-6)


def test_a_gpu_without_transformer_engine_resumes_too(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where megatron-core finds neither that nor apex it takes torch's Adam, whose state it cannot load."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    from fusemega.runtime.fused_adam import FusedAdam, install

    def as_megatron_core_is_imported(found: bool) -> None:
        monkeypatch.setattr(optimizer, "Adam", torch.optim.AdamW)
        monkeypatch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", not found)
        monkeypatch.setattr(distrib_optimizer, "Adam", torch.optim.Adam)
        monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", found)
        monkeypatch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", found)
        with monkeypatch.context() as gpu:
            gpu.setattr(torch.cuda, "is_available", lambda: True)
            install()

    as_megatron_core_is_imported(found=True)
    assert optimizer.Adam is torch.optim.AdamW, "Transformer Engine's stays"
    as_megatron_core_is_imported(found=False)
    run = make_run(training={"save_interval": 2})
    trainer = open_trainer(run)[0]
    assert type(trainer.optimizer.chained_optimizers[0].optimizer) is FusedAdam
    whole = [trainer.step()["lm loss"] for _ in range(2)]
    with trainer.callback(Checkpoints).saver:
        trainer.save()
    whole += [trainer.step()["lm loss"] for _ in range(2)]
    resumed = open_trainer(run)[0]
    assert resumed.iteration == 2
    assert [resumed.step()["lm loss"] for _ in range(2)] == whole[2:]
