"""The ranks of a launch as their launcher sees them: alive, stopped, ended; and which end was the cause of the others.

When one rank dies, its peers lose a connection a moment later. So a rank leaves its traceback in the meeting folder
instead of printing it, and the launcher shows what came first: a rank that was killed, a UserError, a traceback.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fusemega.runtime.meeting import is_echo, recorded_error

_POLL_SECONDS = 0.05
_LOOK_SECONDS = 1.0  # between two looks at the ranks' memory and state
_TO_GO_SECONDS = 30.0  # as torchrun
_ECHO_SECONDS = 2.0  # for ranks that lose the connection to a failed one, to end by themselves


@dataclass
class Rank:
    """One process.

    Attributes:
        rank: its number, global and on this machine.
        pid: its process id.
        poll: its exit status, negative for a signal; None while it runs.
        status: the last answer of `poll`.
        resident_bytes: the most memory that it was seen to hold.
        told: whether the user has been told that it is stopped.
    """

    rank: int
    pid: int
    poll: Callable[[], int | None]
    status: int | None = None
    resident_bytes: int = 0
    told: bool = False

    @property
    def name(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {socket.gethostname()})"

    def look(self) -> None:
        """Notes its peak memory; tells the user once when it is stopped."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            return
        if found := re.search(r"VmHWM:\s+(\d+) kB", status):
            self.resident_bytes = int(found[1]) * 1024
        stopped = re.search(r"^State:\s+T", status, re.MULTILINE) is not None
        if stopped and not self.told:
            _tell(
                f"warning: {self.name} is stopped (SIGSTOP, or another stop signal) and the others wait for it; "
                f"kill -CONT {self.pid} lets it go on, Ctrl-C twice ends the run"
            )
        self.told = stopped


class Ranks:
    """All ranks of a launch.

    Args:
        folder: the meeting folder, in which ranks leave their errors.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ranks: list[Rank] = []
        self._asked: int | None = None  # the first signal that was to end them
        self._kills_before = _kernel_kills()

    def add(self, rank: Rank) -> None:
        """Adds a rank, and passes on to it a signal that came while it was started."""
        self._ranks.append(rank)
        if self._asked is not None:
            self._send([rank], self._asked)

    def signal(self, number: int) -> None:
        """Passes a signal on; kills where somebody has asked before."""
        if number == signal.SIGUSR1:
            for joined in self._folder.glob("*.pid"):  # a rank that has not joined yet would die of the signal
                self._send([rank for rank in self._ranks if rank.pid == int(joined.stem)], number)
        elif self._asked is None:
            self._asked = number
            self._send(self._running(), number)
        else:
            self._send(self._running(), signal.SIGKILL)

    def wait(self) -> int:
        """Waits until all have ended, or one has failed and the others have been ended.

        Returns:
            The launch's status, as `launch_ranks` says.

        Raises:
            UserError: a rank raised one.
        """
        looked = 0.0
        while running := self._running():
            if failed := [rank for rank in self._ranks if rank.status]:
                break
            if time.monotonic() - looked > _LOOK_SECONDS:
                looked = time.monotonic()
                for rank in running:
                    rank.look()
            time.sleep(_POLL_SECONDS)
        failed = [rank for rank in self._ranks if rank.status]
        if self._asked is not None:
            self.end()
            return 128 + self._asked
        if failed:
            killed = _by_signal(failed)
            self._leave_time(_ECHO_SECONDS)  # the others are about to lose the connection, and end because of that
            late = _by_signal(self._ranks)
            self.end()
            return self._explain(killed, late)
        stopped = self._folder / "stopped"
        return int(stopped.read_text()) if stopped.is_file() else 0

    def end(self) -> None:
        """Asks the ranks that still run to end, and kills those that have not ended after 30 s."""
        self._send(self._running(), signal.SIGTERM)
        self._leave_time(_TO_GO_SECONDS)
        self._send(self._running(), signal.SIGKILL)  # a rank that is stopped, or waits in a library, ignores the rest
        while self._running():
            time.sleep(_POLL_SECONDS)

    def _leave_time(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._running() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    def _running(self) -> list[Rank]:
        for rank in self._ranks:
            if rank.status is None:
                rank.status = rank.poll()
        return [rank for rank in self._ranks if rank.status is None]

    def _send(self, ranks: list[Rank], number: int) -> None:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, number)

    def _explain(self, killed: list[Rank], late: list[Rank]) -> int:
        """Reports the first failure.

        Args:
            killed: ranks that had ended by a signal when the first failure was seen; this process had sent none.
            late: these, and those that ended so until the others were ended. On a busy machine an echo may come first.
        """
        if not killed and (error := recorded_error(self._folder)) is not None:
            raise error
        left = sorted(self._folder.glob("traceback.*"), key=lambda path: path.stat().st_mtime_ns)
        texts = [path.read_text(encoding="utf-8") for path in left]
        causes = [text for text in texts if not is_echo(text)]
        if ended := killed or ([] if causes else late):
            number = -(ended[0].status or 0)
            _tell(f"error: {ended[0].name} was ended by {self._why(number, ended[0])}; the other ranks were ended")
            return 128 + number
        if texts:
            print((causes or texts)[0], end="", file=sys.stderr)
        return 1

    def _why(self, number: int, rank: Rank) -> str:
        name = signal.Signals(number).name
        if number != signal.SIGKILL:
            return name
        now = _kernel_kills()
        if self._kills_before is None or now is None:
            by = "by the kernel where memory is short, or by somebody"
        elif now > self._kills_before:
            by = "by the kernel, most likely: its out-of-memory killer was at work meanwhile"
        else:
            by = "by somebody or a batch system's limit: the kernel's out-of-memory killer was not at work meanwhile"
        return f"{name}, {by} (it held {rank.resident_bytes / 1e9:.2f} GB of memory at most)"


def _by_signal(ranks: list[Rank]) -> list[Rank]:
    return [rank for rank in ranks if rank.status is not None and rank.status < 0]


def _kernel_kills() -> int | None:
    """How many processes this machine's kernel has killed because memory ran out, in a control group or in all."""
    try:
        found = re.search(r"^oom_kill (\d+)", Path("/proc/vmstat").read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found[1])


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
