"""USR1 to `fusemega train --nproc 2`: every rank ends its step, one checkpoint is saved, the status is 128 + 10."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from benchmarks import tiny
from fusemega.fixtures import data as assets
from fusemega.monitoring.ranks import read_ranks
from fusemega.training.records import read_metrics

ROOT = Path(__file__).resolve().parents[2]


def test_stops_with_a_checkpoint_and_goes_on(tmp_path: Path, chat_files: assets.ChatData) -> None:
    chat = tiny.write_chat(tmp_path / "chat.jsonl", rows=24, characters=200)
    tiny.write_model(tmp_path / "model", chat)
    output = tmp_path / "run"
    section = {
        "output_dir": str(output),
        "model": {"load": str(tmp_path / "model"), "dtype": "fp32"},
        "data": {"path": str(chat), "seq_length": 128},
        "objective": {"name": "sft"},
        "optimizer": {"lr": 1e-3},
        "training": {"train_epochs": 300.0, "global_batch_size": 6},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(section))
    command = [sys.executable, "-m", "fusemega", "train", str(tmp_path / "run.yaml"), "--nproc", "2"]
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, env=environment, stderr=log)
        try:
            deadline = time.monotonic() + 240
            while not (output.exists() and len(read_metrics(output)) >= 2):
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.2)
            process.send_signal(signal.SIGUSR1)
            status = process.wait(120)
        finally:
            process.kill()
    said = (tmp_path / "log").read_text()
    assert status == 128 + signal.SIGUSR1, said
    done = len(read_metrics(output))
    assert f"stopped after iteration {done}, with a checkpoint" in said and not (output / "done").exists()
    assert [path.name for path in (output / "checkpoints").glob("iter_*")] == [f"iter_{done:07d}"]
    assert [(state.rank, state.iteration, state.ended) for state in read_ranks(output)] == [
        (rank, done, "stopped") for rank in (0, 1)
    ]
    plan = subprocess.run([*command, "--dry-run"], env=environment, capture_output=True, text=True, check=True)
    assert f"resumes after iteration {done}" in plan.stdout
