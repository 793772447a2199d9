"""`fusemega preflight` on pretended nodes: processes with names of nodes, one of them with a fault, one missing."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks import tiny
from fusemega.fixtures import data as assets

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "fusemega", "preflight"]


def _free_port() -> int:
    """One that no other process is given by the system meanwhile: below those that it gives."""
    while True:
        port = random.randrange(15000, 32000)
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)):
                return port


def _run(world_size: int, ranks: list[dict[str, str]], *words: str) -> list[tuple[int, str, str]]:
    """Status, stdout and stderr of each rank that is started."""
    port = _free_port()
    usual = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for rank, changes in enumerate(ranks):
        place = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0", "SLURMD_NODENAME": f"node{rank}"}
        processes.append(
            subprocess.Popen(
                [*COMMAND, *words],
                env=os.environ | usual | place | changes,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    ends = [process.communicate(timeout=240) for process in processes]
    return [(process.returncode, *end) for process, end in zip(processes, ends, strict=True)]


def test_two_sound_nodes_pass(tmp_path: Path, chat_files: assets.ChatData) -> None:
    chat = tiny.write_chat(tmp_path / "chat.jsonl", rows=24, characters=200)
    tiny.write_model(tmp_path / "model", chat)
    section: dict[str, Any] = {
        "output_dir": str(tmp_path / "runs" / "run"),
        "model": {"load": str(tmp_path / "model"), "dtype": "fp32"},
        "data": {"path": str(chat), "seq_length": 128},
        "objective": {"name": "sft"},
        "optimizer": {"lr": 1e-3},
        "training": {"train_iters": 2, "global_batch_size": 6},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(section))
    before = sorted(tmp_path.rglob("*"))
    exclude = tmp_path / "exclude"
    words = [str(tmp_path / "run.yaml"), "--json", "--exclude-file", str(exclude)]
    first, second = _run(2, [{}, {}], *words)
    assert first[0] == second[0] == 0, (first, second)
    found = json.loads(first[1])
    assert found["ok"] and found["nodes"] == ["node0", "node1"] and found["ranks"] == 2 and found["bad_nodes"] == []
    assert [each["group"] for each in found["all_reduce"]] == ["all"] * 3
    assert all(each["is_right"] and each["gb_per_second"] > 0 for each in found["all_reduce"])
    assert second[1] == "" and sorted(tmp_path.rglob("*")) == before, "nothing is left behind"


def test_a_bad_node_and_a_missing_rank_are_named_in_time(tmp_path: Path) -> None:
    """Node 1 should have a GPU and has none; a third rank never comes."""
    exclude, started = tmp_path / "exclude", time.monotonic()
    ends = _run(3, [{}, {"FUSEMEGA_DEVICE": "cuda"}], "--timeout", "20", "--exclude-file", str(exclude))
    assert time.monotonic() - started < 200
    assert [status for status, _, _ in ends] == [1, 1], ends
    lines = ends[0][1].splitlines()
    assert "rank(s) 2 did not come within 20 s; 2 came, from node0, node1" in lines
    assert any(
        line.startswith("bad node node1: torch (") and "FUSEMEGA_DEVICE=cuda asks for one" in line for line in lines
    )
    assert lines[-1] == "preflight: NOT passed, 2 rank(s) on 2 node(s) (node0, node1)"
    assert exclude.read_text() == "node1\n"
