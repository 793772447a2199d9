"""Progress of sampling: responses, tokens a second, time left, tokens spent. A bar on a terminal, lines in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fusemega.runtime.console import console, say
from fusemega.sampling.engine import Response

_LOG_SECONDS = 30.0


@dataclass
class Spent:
    """What the responses of this run cost.

    Attributes:
        responses: how many there are.
        tokens: of the responses.
        prompt_tokens: of their prompts, each counted for each response.
        seconds: since the beginning.
    """

    responses: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens of responses for each second."""
        return self.tokens / self.seconds if self.seconds else 0.0


@contextmanager
def progress(
    total: int, clock: Callable[[], float] = time.monotonic
) -> Iterator[tuple[Spent, Callable[[Response], None]]]:
    """Yields what was spent so far, and a function that is told of each response.

    Args:
        total: responses that this run has to make.
        clock: gives the time in seconds.
    """
    spent, begun = Spent(), clock()

    def count(response: Response) -> None:
        spent.responses += 1
        spent.tokens += response.tokens or 0
        spent.prompt_tokens += response.prompt_tokens or 0
        spent.seconds = clock() - begun

    if console().is_terminal:
        columns = (TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        with Progress(*columns, TimeRemainingColumn(), console=console(), transient=True) as bar:
            task = bar.add_task("", total=total)

            def draw(response: Response) -> None:
                count(response)
                bar.update(task, advance=1, description=_speed(spent))

            yield spent, draw
        return
    said = begun

    def log(response: Response) -> None:
        nonlocal said
        count(response)
        now = begun + spent.seconds
        if now - said >= _LOG_SECONDS and spent.responses < total:
            said = now
            left = (total - spent.responses) * spent.seconds / spent.responses
            say(f"sampling: {spent.responses:,} of {total:,} responses, {_speed(spent)}, about {left:.0f} s left")

    yield spent, log


def _speed(spent: Spent) -> str:
    return f"{spent.tokens_per_second:,.0f} tokens/s, {spent.tokens:,} + {spent.prompt_tokens:,} of prompts spent"
