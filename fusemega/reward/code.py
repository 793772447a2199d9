"""Programs of responses, run against test cases in a sandbox."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic import Field

from fusemega.config import Section
from fusemega.errors import UserError
from fusemega.reward.verdict import Verdict


@dataclass(frozen=True)
class Program:
    """A response with the test cases of its program.

    Attributes:
        response: the whole text; the code is taken out of it (fenced blocks, or all of it).
        tests: Python source: `check(candidate)`, functions `test_...`, or plain asserts.
        entry_point: the name under which the tests know the program's function.
        context: Python source that the response goes on with, as HumanEval's `prompt`.
    """

    response: str
    tests: str
    entry_point: str | None = None
    context: str = ""


class CodeLimits(Section):
    """What a program may use. A program that exceeds a limit is wrong."""

    timeout: float = Field(10.0, gt=0, description="wall-clock seconds for a program with all of its tests")
    memory: int = Field(512, ge=64, description="MiB of address space")


def check_code(programs: Sequence[Program], limits: CodeLimits | None = None, workers: int = 1) -> list[Verdict]:
    """Whether each program passes its tests.

    Returns:
        In the order of `programs`.

    Raises:
        UserError: this machine has no sandbox.
    """
    found = dict(code_verdicts(programs, limits, workers))
    return [found[i] for i in range(len(programs))]


def code_verdicts(
    programs: Sequence[Program], limits: CodeLimits | None = None, workers: int = 1
) -> Iterator[tuple[int, Verdict]]:
    """`check_code`, as they are found: (place in `programs`, verdict)."""
    if programs:
        raise UserError("no sandbox yet")
    yield from ()
