"""Heartbeats: what a rank writes, how it is read, and which rank is named when a run hangs."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fusemega.config import validate
from fusemega.errors import UserError
from fusemega.monitoring.heartbeat import Heartbeat
from fusemega.monitoring.ranks import RankState, find_hang, is_monitor_folder, rank_file, read_rank, read_ranks
from fusemega.monitoring.settings import MonitoringSection
from fusemega.monitoring.watch import Watch
from fusemega.runtime import activity

ALL_REDUCE = {"collective": "all_reduce", "code": "fusemega/training/trainer.py:240 (_counted)"}


def _state(rank: int, **changes: Any) -> RankState:
    now = time.time()
    usual: dict[str, Any] = {
        "rank": rank,
        "world_size": 4,
        "host": f"node{rank // 2}",
        "pid": 100 + rank,
        "device": "cpu",
        "started": now - 1000,
        "time": now,
        "beats": 7,
        "iteration": 12,
        "train_iters": 20,
        "phase": activity.COMPUTE,
        "since": now - 1,
        "detail": None,
        "moved": now,
        "collective": "",
        "code": "",
        "ended": None,
        "device_state": {},
        "device_worst": {},
        "device_errors": [],
    }
    return RankState(**(usual | changes))


def _write(folder: Path, *states: RankState) -> None:
    for state in states:
        path = rank_file(folder, state.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(state.as_json())


def test_what_is_written_is_read(tmp_path: Path) -> None:
    states = [_state(rank, detail="the data are read", device_state={"a": 1.5}) for rank in range(4)]
    _write(tmp_path, *states)
    assert read_ranks(tmp_path) == states
    assert is_monitor_folder(tmp_path / "monitor")
    _write(tmp_path, replace(states[0], world_size=2))
    assert [state.rank for state in read_ranks(tmp_path)] == [0, 1], "an earlier start had more ranks"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"rank": 1}', '{"rank": "x"}'])
def test_files_of_others_are_no_ranks(text: str, tmp_path: Path) -> None:
    _write(tmp_path, _state(0))
    rank_file(tmp_path, 1).write_text(text)
    assert [state.rank for state in read_ranks(tmp_path)] == [0]
    assert read_ranks(tmp_path / "absent") == []
    (tmp_path / "monitor" / "thesis.tex").touch()
    assert not is_monitor_folder(tmp_path / "monitor")


def test_the_reader_needs_no_torch() -> None:
    program = "import sys, fusemega.monitoring.ranks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_a_run_that_moves_does_not_hang() -> None:
    now = time.time()
    states = [_state(rank, moved=now - 1000, **ALL_REDUCE) for rank in range(3)]
    assert find_hang([*states, _state(3)]) is None
    assert find_hang([]) is None
    assert find_hang([_state(rank, time=now - 1000, ended="finished") for rank in range(4)]) is None


def test_the_rank_without_a_heartbeat_is_named() -> None:
    now = time.time()
    states = [_state(rank, moved=now - 40, **ALL_REDUCE) for rank in (0, 1, 3)]
    hang = find_hang([*states, _state(2, time=now - 45, phase=activity.OPTIMIZER)])
    assert hang is not None and hang.kind == "silent" and [state.rank for state in hang.ranks] == [2]
    assert hang.line == (
        "rank 2 (process 102 on node1) has written no heartbeat for 45 s, and was last in optimizer after iteration "
        "12: stopped (SIGSTOP, a debugger), on a lost node, or kept busy by a library; waiting: ranks 0-1, 3 in "
        "all_reduce, at fusemega/training/trainer.py:240 (_counted)"
    )


def test_the_rank_for_which_the_others_wait_is_named() -> None:
    moved = time.time() - 400
    states = [_state(rank, moved=moved, **ALL_REDUCE) for rank in (0, 1, 2)]
    hang = find_hang([*states, _state(3, moved=moved, code="fusemega/text/data.py:7 (read)")])
    assert hang is not None and hang.kind == "stuck" and [state.rank for state in hang.ranks] == [3]
    assert "no rank has moved for 400 s: rank 3 (process 103 on node1) is in forward and backward" in hang.line
    assert "at fusemega/text/data.py:7 (read); waiting: ranks 0-2 in all_reduce" in hang.line


def test_ranks_in_different_collectives_are_told_apart() -> None:
    moved = time.time() - 400
    states = [_state(rank, moved=moved, **ALL_REDUCE) for rank in (0, 1, 2)]
    hang = find_hang([*states, _state(3, moved=moved, collective="barrier", code="b.py:1 (f)")])
    assert hang is not None and hang.kind == "waiting" and [state.rank for state in hang.ranks] == [3]
    assert "ranks 3 in barrier, at b.py:1 (f); ranks 0-2 in all_reduce" in hang.line
    hang = find_hang(states)
    assert hang is not None and "all wait in all_reduce" in hang.line


def test_a_heartbeat_says_where_its_rank_stands(tmp_path: Path) -> None:
    activity.reached(3, 9)
    heartbeat = Heartbeat(tmp_path, 5, 8, "cpu", 0.05)
    heartbeat.start()
    heartbeat.tell({"Temperature": 70.0})
    heartbeat.tell({"Temperature": 60.0})
    heartbeat.tell_error("XID 79")
    gate = threading.Event()
    with activity.doing(activity.OPTIMIZER), activity.doing("a detail", is_phase=False):
        threading.Timer(1.0, gate.set).start()
        gate.wait()
        seen = read_rank(rank_file(tmp_path, 5))
    assert activity.current().phase == activity.BETWEEN
    activity.reached(0, 0)
    assert activity.current().phase == activity.STARTING
    assert seen is not None and (seen.rank, seen.world_size, seen.iteration, seen.train_iters) == (5, 8, 3, 9)
    assert (seen.phase, seen.detail, seen.ended) == (activity.OPTIMIZER, "a detail", None)
    assert seen.standing > 0.3 and seen.beats > 2
    assert (seen.device_state, seen.device_worst) == ({"Temperature": 60.0}, {"Temperature": 70.0})
    assert seen.device_errors == ["XID 79"]
    heartbeat.end("failed: no luck")
    last = read_rank(rank_file(tmp_path, 5))
    assert last is not None and last.ended == "failed: no luck" and last.beats > seen.beats
    heartbeat.remove()
    assert not (tmp_path / "monitor").exists()


def test_where_a_collective_is_called_is_seen() -> None:
    """A stand-in for torch's file, with the same end of its name."""
    found: list[activity.CodePlace] = []
    names: dict[str, Any] = {"look": lambda: found.append(activity.place())}
    torchs = "def wrapper():\n    look()\ndef all_reduce():\n    wrapper()\n"
    exec(compile(torchs, "/x/torch/distributed/distributed_c10d.py", "exec"), names)
    exec(compile("def step():\n    all_reduce()\n", "/x/megatron/core/y.py", "exec"), names)
    names["step"]()
    assert (found[0].collective, found[0].code) == ("all_reduce", "megatron/core/y.py:2 (step)")


def test_the_phase_of_an_error_is_the_innermost_that_it_ended() -> None:
    with pytest.raises(ValueError) as raised, activity.doing(activity.STEP), activity.doing(activity.COMPUTE):
        raise ValueError
    assert activity.phase_of(raised.value) == activity.COMPUTE and activity.current().phase == activity.STARTING
    assert activity.phase_of(ValueError()) == activity.STARTING


def test_a_hang_is_said_once_and_its_end_too(tmp_path: Path) -> None:
    said: list[str] = []
    watch = Watch(tmp_path, range(2), 0.05, silent_after=0.4, hang_after=100, say=said.append)
    first, second = _state(0, world_size=2), _state(1, world_size=2)
    _write(tmp_path, first, second)
    watch.start()
    deadline = time.monotonic() + 60
    beats = 7
    while len(said) < 2 and time.monotonic() < deadline:
        beats += 1
        _write(tmp_path, replace(first, beats=beats))
        if said:
            _write(tmp_path, replace(second, beats=beats))
        time.sleep(0.05)
    watch.end()
    assert said[0].startswith("rank 1 (process 101 on node0) has written no heartbeat for 0 s"), said
    assert said[1].startswith("rank 1 (process 101 on node0): going on, after "), said


def test_silence_must_be_longer_than_a_beat() -> None:
    with pytest.raises(UserError, match=r"silent_seconds 5 is less than twice heartbeat_seconds 4"):
        validate(MonitoringSection, {"heartbeat_seconds": 4, "silent_seconds": 5}, "run.yaml")
