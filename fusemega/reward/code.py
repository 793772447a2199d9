"""Programs of responses, run against test cases in a sandbox.

The program and its tests run in two sandboxes that share nothing but two pipes: the tests call the program's function,
and get plain data back. So nothing that a program does but answer rightly passes the tests: it does not see them, nor
their process, nor the pipe on which they tell the verdict.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from pydantic import Field

from fusemega.config import Section
from fusemega.reward.extract import code_of, defines
from fusemega.reward.sandbox import Name, Sandbox, find_sandbox
from fusemega.reward.verdict import Verdict

_VERDICT_BYTES = 1 << 12


@dataclass(frozen=True)
class Program:
    """A response with the test cases of its program.

    Attributes:
        response: the whole text; the code is taken out of it (fenced blocks, or all of it).
        tests: Python source: asserts that call the function by its name, `check(candidate)`, or functions `test_...`.
        entry_point: the name under which the tests know the program's function; or an expression, `Solution().add`,
            for tests with `check(candidate)`. None: the one name that the tests call and do not define.
        context: Python source that the response goes on with, as HumanEval's `prompt`; or that it repeats.
    """

    response: str
    tests: str
    entry_point: str | None = None
    context: str = ""

    @property
    def sources(self) -> list[str]:
        """The program's code; of several, the first that is Python counts."""
        code = code_of(self.response, self.entry_point)
        if not self.context:
            return [code]
        # A whole function after an unfinished one of its name takes its place, and has its imports and helpers.
        if defines(code, self.entry_point):
            return [f"{self.context}\n{code}", code]
        return [self.context + code]


class CodeLimits(Section):
    """What a program may use, and its tests. A program that exceeds a limit is wrong."""

    timeout: float = Field(
        10.0, gt=0, description="seconds of processor time (rounded up) for a program with all of its tests"
    )
    wall_timeout: float = Field(
        60.0, gt=0, description="seconds by the wall's clock for the same, which end a program that waits"
    )
    memory: int = Field(512, ge=64, description="MiB of address space")
    path: list[str] = Field(
        [], description="folders that programs and tests may import from besides Python's own library, read-only"
    )
    sandbox: Name = Field("auto", description="auto takes bubblewrap where it works, else unshare")


def check_code(programs: Sequence[Program], limits: CodeLimits | None = None, workers: int = 1) -> list[Verdict]:
    """Whether each program passes its tests.

    Args:
        workers: how many programs run at the same time.

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
    if not programs:
        return
    limits = limits or CodeLimits()
    sandbox = find_sandbox(limits.sandbox)
    ended = False

    def check(program: Program) -> Verdict:
        return _verdict(sandbox, program, limits, lambda: ended)

    with ThreadPoolExecutor(workers) as threads:
        waiting = {threads.submit(check, program): i for i, program in enumerate(programs)}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        finally:  # nobody may want the rest
            ended = True
            threads.shutdown(wait=False, cancel_futures=True)


def _verdict(sandbox: Sandbox, program: Program, limits: CodeLimits, ended: Callable[[], bool]) -> Verdict:
    sources = program.sources
    if not any(source.strip() for source in sources):
        return Verdict(False, "no code")
    path = [os.path.realpath(folder) for folder in limits.path]
    tests = {"tests": program.tests, "entry_point": program.entry_point, "context": program.context, "path": path}
    with ExitStack() as held:
        ends = [os.pipe() for _ in range(3)]
        opened = {end for pair in ends for end in pair}
        held.callback(_close, opened)
        (calls, call), (answers, answer), (verdict, tell) = ends
        running, testing = (
            held.enter_context(sandbox.process(role, given, pipes, limits.timeout, limits.memory))
            for role, given, pipes in (
                ("program", {"sources": sources, "path": path}, [calls, answer]),
                ("cases", tests, [call, answers, tell]),
            )
        )
        # So that each sees the other's end.
        _close(opened - {verdict})
        opened.intersection_update({verdict})
        content = _read(verdict, time.monotonic() + limits.wall_timeout, ended)
        if content is None:
            return Verdict(False, "timed out")
        try:
            correct, reason = json.loads(content)
        except ValueError:
            return Verdict(False, "timed out") if _killed(testing) else Verdict(None, "the tests ended early")
        if reason == "ends early" and _killed(running):
            reason = "timed out"
    return Verdict(correct, reason)


def _close(ends: set[int]) -> None:
    for end in ends:
        os.close(end)


def _killed(process: subprocess.Popen[bytes]) -> bool:
    """Whether the kernel has killed what has ended inside, as it does when its processor time is used up."""
    with suppress(subprocess.TimeoutExpired):
        return process.wait(timeout=10) in (-signal.SIGKILL, 128 + signal.SIGKILL)
    return False


def _read(pipe: int, end: float, ended: Callable[[], bool]) -> bytes | None:
    """All that is written there until it is closed; None: it is still open."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    content = b""
    while (left := end - time.monotonic()) > 0 and not ended():
        if poll.poll(min(left, 1.0) * 1000):
            more = os.read(pipe, _VERDICT_BYTES)
            if not more or len(content) > _VERDICT_BYTES:
                return content
            content += more
    return None
