"""Progress of a conversion: on a terminal a bar with bytes per second and time left, in a log one line per minute."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from fusemega.runtime.console import console, say

_LOG_SECONDS = 60.0


class Meter:
    """Counts bytes; `add` is called as they are done."""

    def __init__(self, what: str, total: int, bar: Progress | None) -> None:
        self._what = what
        self._total = total
        self._done = 0
        self._begun = self._said = time.monotonic()
        self._bar = bar
        self._task = None if bar is None else bar.add_task(what, total=total)

    def add(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, count)
        elif now - self._said >= _LOG_SECONDS and self._done < self._total:
            self._said = now
            speed = self._done / (now - self._begun)
            left = (self._total - self._done) / speed
            done = f"{decimal(self._done)} of {decimal(self._total)}"
            say(f"{self._what}: {done}, {decimal(int(speed))}/s, {left:.0f} s left")


@contextmanager
def meter(what: str, total: int) -> Iterator[Meter]:
    """A meter of `total` bytes, shown on stderr of the main process while the block runs."""
    if not console().is_terminal:
        yield Meter(what, total, None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console(), transient=True) as bar:
        yield Meter(what, total, bar)
