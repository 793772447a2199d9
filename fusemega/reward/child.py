"""A process that answers one question at a time, and is ended when an answer takes too long.

A question may take so much processor time, of which the process itself gives account to the kernel: other work on the
machine changes no result. And so much time of the wall's clock, after which it is killed.

A limit inside a process does not hold: `signal.alarm` works in the main thread alone, and a library in the middle of a
computation looks at no flag. A process can be killed at any moment, from any thread, and takes nothing along.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

START_SECONDS = 120.0  # to import what the answers need, on a busy machine with a cold disk
PATIENCE = 6.0  # seconds of the wall's clock for one of processor time


class NoAnswer(Exception):
    """The process gave no answer.

    Attributes:
        timed_out: it took too long; otherwise it ended by itself.
    """

    def __init__(self, timed_out: bool) -> None:
        super().__init__("timed out" if timed_out else "ended early")
        self.timed_out = timed_out


class Child:
    """A Python script that reads lines and answers each with a line; it says an empty line first, when it is ready.

    It is started when it is first asked, and again after it was killed. For one thread at a time.

    Args:
        script: its path; it imports nothing of fusemega.
        arguments: of its command line.
    """

    def __init__(self, script: Path, arguments: tuple[str, ...] = ()) -> None:
        self._command = [sys.executable, str(script), *arguments]
        self._process: subprocess.Popen[bytes] | None = None
        self._read = b""

    def ask(self, question: bytes, seconds: float) -> bytes:
        """The answer to a question of one line.

        Args:
            seconds: of processor time, after which the script lets the kernel end it with SIGPROF; a multiple of it by
                the wall's clock, after which it is killed here.

        Raises:
            NoAnswer: it took longer, or the process ended.
        """
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(question + b"\n")
            self._process.stdin.flush()
            return self._line(PATIENCE * seconds)
        except BrokenPipeError:
            self.end()
            raise NoAnswer(timed_out=False) from None
        except BaseException:
            # Half an answer would be taken for the next one's.
            self.end()
            raise

    def end(self) -> None:
        """Kills the process."""
        process, self._process, self._read = self._process, None, b""
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    assert pipe is not None
                    pipe.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        try:
            self._line(START_SECONDS)
        except BaseException:
            self.end()
            raise

    def _line(self, seconds: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        pipe, end = self._process.stdout.fileno(), time.monotonic() + seconds
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        while b"\n" not in self._read:
            if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
                raise NoAnswer(timed_out=True)
            more = os.read(pipe, 1 << 16)
            if not more:
                raise NoAnswer(timed_out=self._process.wait() == -signal.SIGPROF)
            self._read += more
        line, _, self._read = self._read.partition(b"\n")
        return line
