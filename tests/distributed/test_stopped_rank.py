"""A rank of a torchrun that is stopped by SIGSTOP: named in the log, and at the timeout with the collective."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from benchmarks import tiny
from fusemega.fixtures import data as assets
from fusemega.monitoring.ranks import read_ranks
from fusemega.training.records import SLOWEST, SLOWEST_RATIO, read_metrics

ROOT = Path(__file__).resolve().parents[2]


def test_is_named_within_a_minute(tmp_path: Path, chat_files: assets.ChatData) -> None:
    chat = tiny.write_chat(tmp_path / "chat.jsonl", rows=24, characters=200)
    tiny.write_model(tmp_path / "model", chat)
    output = tmp_path / "run"
    section = {
        "output_dir": str(output),
        "model": {"load": str(tmp_path / "model"), "dtype": "fp32"},
        "data": {"path": str(chat), "seq_length": 128},
        "objective": {"name": "sft"},
        "optimizer": {"lr": 1e-3},
        "training": {"train_iters": 100_000, "global_batch_size": 6},
        "monitoring": {"heartbeat_seconds": 0.5, "silent_seconds": 4, "collective_timeout_minutes": 0.3}
        | {"straggler_interval": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(section))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "fusemega", "train", str(tmp_path / "run.yaml")]
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"), stderr=out, stdout=out
        )
    rank = 0
    try:
        _until(lambda: output.exists() and len(read_metrics(output)) >= 2, process, log)
        assert read_metrics(output)[1].keys() >= {SLOWEST, SLOWEST_RATIO}
        state = read_ranks(output)[1]
        rank = state.pid
        assert (state.rank, state.world_size, state.host, state.device) == (1, 2, socket.gethostname(), "cpu")
        os.kill(rank, signal.SIGSTOP)
        stopped = time.monotonic()
        name = rf"rank 1 \(process {rank} on {re.escape(socket.gethostname())}\)"
        silent = rf"warning: {name} has written no heartbeat for \d+ s, and was last in .*; waiting: rank 0.*"
        _until(lambda: re.search(silent, log.read_text()) is not None, process, log)
        assert time.monotonic() - stopped < 60
        assert f"process {rank} is stopped: kill -CONT {rank} lets it go on" in log.read_text()
        absent = (
            r"warning: rank 0: [\w ]+, at \S+:\d+ \(\w+\), in (?!starting).* after iteration \d+, did not end within "
            rf"0\.3 minutes \(monitoring\.collective_timeout_minutes\): {name} has written no heartbeat"
        )
        _until(lambda: re.search(absent, log.read_text()) is not None, process, log)
        _until(lambda: read_ranks(output)[0].ended is not None, process, log)
        ended = read_ranks(output)[0].ended
        assert ended is not None and ended.startswith("failed: ")
    finally:
        process.terminate()
        if rank:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        process.wait(100)


def _until(holds: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 240
    while not holds():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
