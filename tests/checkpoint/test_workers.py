"""Processes that share a list of work items."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from fusemega.checkpoint.workers import Workers


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
