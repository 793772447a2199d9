"""Progress of a pass over a data set, shown by rank 0: a bar on a terminal, a line every half minute in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from fusemega.runtime.console import console, global_rank, say

_LOG_SECONDS = 30.0


@contextmanager
def progress(what: str, total: int, clock: Callable[[], float] = time.monotonic) -> Iterator[Callable[[int], None]]:
    """Yields a function that is told how many more positions, of `total`, are done; shows share, speed and time left.

    Args:
        what: start of the line.
        clock: gives the time in seconds.
    """
    if console().is_terminal and global_rank() == 0:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), _Speed(), TimeRemainingColumn())
        with Progress(*columns, console=console(), transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda count: bar.advance(task, count)
        return
    done, begun = 0, clock()
    said = begun

    def advance(count: int) -> None:
        nonlocal done, said
        done += count
        now = clock()
        if now - said >= _LOG_SECONDS and 0 < done < total:
            said = now
            speed = done / (now - begun)
            say(
                f"{what}: {100 * done / total:.1f} % of {total:,} positions, {speed:,.0f}/s, "
                f"about {(total - done) / speed:.0f} s left"
            )

    yield advance


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} positions/s")
