"""`verify` and `judge` after kill -9: nothing that is known is checked or asked again, the same rows are written."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusemega.files.owned import scratch_of
from fusemega.reward.judge import judge
from fusemega.reward.verify import VerifyRun, verify
from tests.reward.test_commands import judge_run, longest_wins, run_of, write
from tests.sampling import server
from tests.sampling.server import serve


def recorded(output: Path) -> int:
    """Results in the journal of an unfinished output."""
    journal = scratch_of(output) / "journal.jsonl"
    lines = journal.read_bytes().split(b"\n")[1:-1] if journal.exists() else []
    return sum(len(json.loads(line)) for line in lines)


def killed_when(command: Callable[[Any], Any], run: Any, ready: Callable[[], bool]) -> None:
    """Runs a command in a process of its own, which is killed once `ready` says so."""
    child = multiprocessing.get_context("spawn").Process(target=command, args=(run,))
    child.start()
    while not ready():
        time.sleep(0.02)
        assert child.is_alive()
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()


def test_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wait = "import time; time.sleep(0.15)\nassert a() == 1"
    rows = [
        {"prompt": str(i), "responses": [f"def a(): return {i}"], "tests": wait, "entry_point": "a"} for i in range(12)
    ]
    data, whole, out = write(tmp_path / "rows.jsonl", *rows), tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    settings = {"workers": 1}
    verify(run_of(VerifyRun, data, whole, **settings))
    killed_when(verify, run_of(VerifyRun, data, out, **settings), lambda: recorded(out) >= 2)
    known = recorded(out)
    assert not out.exists() and 2 <= known < 12
    capsys.readouterr()
    found = verify(run_of(VerifyRun, data, out, **settings))
    assert f"{known} are" in capsys.readouterr().err and (found.correct, found.wrong) == (1, 11)
    assert out.read_bytes() == whole.read_bytes()


def test_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "answer", longest_wins)
    rows = [{"prompt": f"number {i}", "responses": ["ccc", "a", "bb"]} for i in range(4)]
    data, whole, out = write(tmp_path / "rows.jsonl", *rows), tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    with serve() as served:
        run = judge_run(served.url, data, out)
        judge(judge_run(served.url, data, whole))
        assert sum(served.asked.values()) == 24
        served.asked.clear()
        served.times.clear()
        served.faults["number 2|a|bb"] = ["timeout"]  # it waits there until it is killed
        killed_when(judge, run, lambda: "number 2|a|bb" in served.times and recorded(out) >= 12)
        known, asked = recorded(out), sum(served.asked.values())
        judge(run)
        assert sum(served.asked.values()) - asked == 24 - known, "what was recorded is not asked again"
    assert out.read_bytes() == whole.read_bytes()
