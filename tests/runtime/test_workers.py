"""Processes that share a list of work items."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest

from fusemega.runtime.workers import WorkerLost, Workers, start_workers


class Finished:
    """A pool whose items are all finished before anyone asks."""

    submitted = 0

    def submit(self, function: Callable[[Any], Any], item: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.submitted += 1
        try:
            future.set_result(function(item))
        except OSError as error:
            future.set_exception(error)
        return future


def _half(number: int) -> int:
    if number == 3:
        raise OSError(f"no half of {number}")
    return number // 2


def test_what_is_finished_comes_before_what_failed() -> None:
    """However late the caller looks: a full disk must not hide the parts that were written."""
    got = []
    with pytest.raises(OSError, match="no half of 3"):
        for pair in Workers(Finished(), 2).map(_half, [3, 2, 8]):  # type: ignore[arg-type]
            got.append(pair)
    assert sorted(got) == [(2, 1), (8, 4)]


def test_little_is_begun_before_the_caller_has_seen_what_is_finished() -> None:
    """Else a disk may fill up before the first part is written down."""
    pool, seen = Finished(), []
    for pair in Workers(pool, 2).map(_half, range(10, 50)):  # type: ignore[arg-type]
        seen.append(pair)
        assert pool.submitted <= len(seen) + 3
    assert sorted(seen) == [(number, number // 2) for number in range(10, 50)]


_factor = 1


def _times(number: int) -> int:
    return _factor * number


def test_forked_processes_have_what_this_one_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "_factor", 7)
    with start_workers(2, forked=True) as pool:
        assert sorted(pool.map(_times, range(9))) == [(number, 7 * number) for number in range(9)]


def _fail_beside_a_long_one(folder: Path, number: int) -> None:
    (folder / f"begun{number}").touch()
    while number == 0 and not (folder / "begun1").exists():
        time.sleep(0.01)
    if number == 0:
        raise ValueError("the first one fails")
    time.sleep(120)
    (folder / "ended").touch()


@pytest.mark.parametrize("forked", [True, False])
def test_an_error_ends_what_the_others_are_at(forked: bool, tmp_path: Path) -> None:
    others = set(active_children())
    with pytest.raises(ValueError, match="the first one fails"), start_workers(2, forked) as pool:
        list(pool.map(partial(_fail_beside_a_long_one, tmp_path), range(2)))
    assert not (tmp_path / "ended").exists() and not set(active_children()) - others


def _killed(number: int) -> None:
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_was_killed_is_told_of() -> None:
    others = set(active_children())
    with pytest.raises(WorkerLost, match="one of 2 worker processes was ended from outside"):
        with start_workers(2, forked=True) as pool:
            list(pool.map(_killed, range(9)))
    assert not set(active_children()) - others


class _OfTwo(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


def _cannot_be_sent(number: int) -> None:
    raise _OfTwo(number, 7)


def test_an_error_that_cannot_be_sent_is_told_as_text() -> None:
    with pytest.raises(RuntimeError, match="_OfTwo: 3 and 7"), start_workers(2, forked=True) as pool:
        list(pool.map(_cannot_be_sent, [3]))
