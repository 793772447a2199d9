"""A disk that fills up while a run writes to it: one line that says so, and no half of a checkpoint left."""

from __future__ import annotations

import multiprocessing
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fusemega.checkpoint.series import latest_checkpoint
from fusemega.errors import UserError
from fusemega.training.assembly import train
from fusemega.training.run_file import TrainRun


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`small_disk("4m")`: a folder on a file system of that size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small tmpfs needs root")
        return folder

    yield mount
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def test_during_the_first_checkpoint(
    make_run: Callable[..., TrainRun], small_disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = small_disk("1m")

    def slow() -> int:
        time.sleep(1)
        return 0

    monkeypatch.setattr("fusemega.checkpoint.saver.own_memory", slow)  # the last thing that a writer does
    with pytest.raises(UserError, match=r"checkpoints/iter_0000002: checkpoint not saved: the disk is full"):
        train(make_run(output_dir=str(disk / "run"), training={"save_interval": 2}))
    assert list((disk / "run" / "checkpoints").iterdir()) == []
    assert multiprocessing.active_children() == [], "a writer that is not waited for may add to a removed folder"


def test_during_a_later_one_the_earlier_stays(
    make_run: Callable[..., TrainRun], small_disk: Callable[[str], Path], tmp_path: Path
) -> None:
    disk = small_disk("4m")
    run = make_run(output_dir=str(disk / "run"), training={"save_interval": 2})
    with pytest.raises(UserError, match=r"iter_0000004: checkpoint not saved: the disk is full"):
        train(run)
    newest = latest_checkpoint(disk / "run" / "checkpoints")
    assert newest is not None and newest.name == "iter_0000002"
    # With room again, the run goes on from there.
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    train(run)
    assert (disk / "run" / "done").read_text() == "4\n"
