"""How many rows of data are done, shown in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


@contextmanager
def row_progress(what: str, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """A function that gets the number of rows done, and shows it on stderr if that is a terminal."""
    columns = (SpinnerColumn(), TextColumn(what), MofNCompleteColumn(), TextColumn("rows"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda rows: bar.advance(task, rows)
