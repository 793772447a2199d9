"""`--nproc`: torchrun inside the command, with one error line, honest statuses and USR1 passed on."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fusemega.errors import UserError
from fusemega.launch.local import launch_ranks

ROOT = Path(__file__).resolve().parents[2]

# Every process of the launch starts with this file: it puts a stand-in in the place of the command `train`.
STAND_IN = """
import os, pathlib, signal, sys, time, types
from fusemega.errors import UserError
from fusemega.launch.local import LAUNCH_FOLDER, launch_ranks

def command(mode: str) -> None:
    if "RANK" not in os.environ:
        sys.exit(launch_ranks(["train", mode], 2))
    rank, out = os.environ["RANK"], pathlib.Path(os.environ["OUT"])
    (out / f"threads{rank}").write_text(os.environ["OMP_NUM_THREADS"])
    if mode == "same-error":
        raise UserError("data.jsonl:7: empty row")
    if mode == "one-error":
        if rank == "1":
            raise UserError("rank one only: disk full")
        while not os.path.exists(os.environ[LAUNCH_FOLDER] + "/error"):
            time.sleep(0.05)
        raise RuntimeError("Connection closed by peer")
    if mode == "crash" and rank == "1":
        raise RuntimeError("a real fault")
    if mode in ("killed", "killed, and seen late"):
        folder = pathlib.Path(os.environ[LAUNCH_FOLDER])
        while rank == "1" and mode != "killed" and not (folder / "traceback.0").exists():
            time.sleep(0.01)
        if rank == "1":
            (out / "going").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        while mode == "killed" and not (out / "going").exists():
            time.sleep(0.05)
        raise RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1")
    if mode == "stopped" and rank == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    if mode in ("wait", "stopped"):
        signal.signal(signal.SIGUSR1, lambda *_: ((out / f"saved{rank}").write_text("saved"), sys.exit(0)))
        (out / f"ready{rank}").write_text("ready")
        time.sleep(60)

sys.modules["fusemega.cli.train"] = types.ModuleType("fusemega.cli.train")
sys.modules["fusemega.cli.train"].command = command
for unused in ("transformers", "transformers.modeling_utils", "fusemega.scoring.evaluate", "fusemega.scoring.teach",
               "fusemega.training.metrics", "fusemega.training.assembly"):
    sys.modules[unused] = types.ModuleType(unused)  # what the fork server imports takes seconds
"""


def _start(mode: str, folder: Path) -> subprocess.Popen[str]:
    (folder / "sitecustomize.py").write_text(STAND_IN)
    env = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE")}
    env |= {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OUT": str(folder), "TMPDIR": str(_temporary(folder))}
    return subprocess.Popen(
        [sys.executable, "-m", "fusemega", "train", mode],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )


def _finish(process: subprocess.Popen[str], folder: Path) -> tuple[int, str]:
    """Its status and what it said; every process has ended (they hold the pipe), and no temporary file is left."""
    _, err = process.communicate(timeout=100)
    assert _left(folder) == []
    return process.returncode, err


def _temporary(folder: Path) -> Path:
    """A folder for temporary files, too deep for a socket's name."""
    deep = folder / ("deep" * 30)
    deep.mkdir(exist_ok=True)
    return deep


def _left(folder: Path) -> list[str]:
    return [path.name for path in _temporary(folder).iterdir() if not path.name.startswith("torchinductor")]


def _wait_for(process: subprocess.Popen[str], folder: Path, files: str, count: int) -> None:
    deadline = time.monotonic() + 100
    while len(list(folder.glob(files))) < count and process.poll() is None:
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.1)


def test_ranks_that_end_well(tmp_path: Path) -> None:
    assert _finish(_start("well", tmp_path), tmp_path) == (0, "")
    share = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert [(tmp_path / f"threads{rank}").read_text() for rank in (0, 1)] == [share, share]


@pytest.mark.parametrize(
    ("mode", "line"),
    [("same-error", "error: data.jsonl:7: empty row\n"), ("one-error", "error: rank one only: disk full\n")],
)
def test_a_user_error_in_the_ranks_is_one_line(mode: str, line: str, tmp_path: Path) -> None:
    assert _finish(_start(mode, tmp_path), tmp_path) == (2, line)


def test_a_crash_keeps_its_traceback(tmp_path: Path) -> None:
    status, err = _finish(_start("crash", tmp_path), tmp_path)
    assert status == 1 and err.count("RuntimeError: a real fault") == 1 and "ChildFailedError" not in err


@pytest.mark.parametrize("mode", ["killed", "killed, and seen late"])
def test_a_killed_rank_is_named(mode: str, tmp_path: Path) -> None:
    status, err = _finish(_start(mode, tmp_path), tmp_path)
    assert status == 128 + signal.SIGKILL and err.count("\n") == 1
    assert re.match(
        rf"error: rank 1 \(process \d+ on {re.escape(socket.gethostname())}\) was ended by SIGKILL, by ", err
    )


def test_a_stopped_rank_is_named_and_ctrl_c_twice_ends_it(tmp_path: Path) -> None:
    process = _start("stopped", tmp_path)
    assert process.stderr is not None
    assert re.match(r"warning: rank 1 \(process \d+ on .*\) is stopped \(SIGSTOP", process.stderr.readline())
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert _finish(process, tmp_path)[0] == 128 + signal.SIGINT


def test_a_killed_launcher_takes_its_ranks_along(tmp_path: Path) -> None:
    process = _start("wait", tmp_path)
    _wait_for(process, tmp_path, "ready?", 2)
    process.kill()
    assert _finish(process, tmp_path) == (-signal.SIGKILL, "")


@pytest.mark.parametrize(
    ("sent", "status"),
    [(signal.SIGUSR1, 0), (signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGHUP, 128 + signal.SIGHUP)],
)
def test_signals_reach_the_ranks(sent: signal.Signals, status: int, tmp_path: Path) -> None:
    outside = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, also for these tests
    try:
        process = _start("wait", tmp_path)
    finally:
        signal.signal(signal.SIGHUP, outside)
    _wait_for(process, tmp_path, "ready?", 2)
    process.send_signal(sent)
    assert _finish(process, tmp_path)[0] == status
    assert len(list(tmp_path.glob("saved?"))) == (2 if sent == signal.SIGUSR1 else 0)


def test_nproc_inside_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(UserError, match="already rank 2 of a launcher's 4; leave --nproc out"):
        launch_ranks(["train", "run.yaml"], 2)
