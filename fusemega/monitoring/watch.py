"""Names in the run's log the rank that hangs. Rank 0 watches all ranks, and rank 1 watches rank 0.

The clocks of nodes are not compared: a rank is silent when its file has not changed for a while by the watcher's clock.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fusemega.monitoring.ranks import Hang, RankState, find_hang, rank_file, read_rank
from fusemega.runtime.console import warn_from_here


class Watch:
    """A thread that reads the ranks' heartbeats, and warns once about each hang, and once when it is over.

    Args:
        output_dir: the run's folder.
        ranks: those to watch.
        seconds: between two looks.
        silent_after, hang_after: as in `find_hang`.
        stopped_are_named: another process names ranks of this machine that are stopped.
        say: takes each line.
    """

    def __init__(
        self,
        output_dir: Path,
        ranks: range,
        seconds: float,
        silent_after: float,
        hang_after: float,
        stopped_are_named: bool = False,
        say: Callable[[str], None] = warn_from_here,
    ) -> None:
        self._paths = [rank_file(output_dir, rank) for rank in ranks]
        self._seconds, self._limits, self._say = seconds, (silent_after, hang_after), say
        self._stopped_are_named = stopped_are_named
        self._started = time.time()
        self._seen: dict[int, tuple[tuple[float, int], float, RankState]] = {}
        self._told: tuple[Hang, float] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._stop.set()
        self._thread.join(self._seconds + 5)

    def states(self) -> list[RankState]:
        """All ranks, as they were last seen."""
        return [state for _, _, state in list(self._seen.values())]

    def look(self) -> Hang | None:
        """Reads all files, and returns what holds up the run."""
        now = time.monotonic()
        for path in self._paths:
            state = read_rank(path)
            if state is not None and ((state.started, state.beats) != self._beat(state.rank)):
                self._seen[state.rank] = (state.started, state.beats), now, state
        return find_hang(self.states(), *self._limits, age=lambda state: now - self._seen[state.rank][1])

    def _beat(self, rank: int) -> tuple[float, int] | None:
        return self._seen[rank][0] if rank in self._seen else None

    def _run(self) -> None:
        looked = time.monotonic()
        while not self._stop.wait(self._seconds):
            late, looked = time.monotonic() - looked - self._seconds, time.monotonic()
            if late > self._limits[0] / 2:  # this process was stopped itself, and has seen nothing meanwhile
                self._seen = {rank: (beat, looked, state) for rank, (beat, _, state) in self._seen.items()}
            self._tell(self.look())

    def _tell(self, hang: Hang | None) -> None:
        if hang is not None and hang.kind == "silent" and self._stopped_are_named:
            return
        who = None if hang is None else (hang.kind, [state.rank for state in hang.ranks])
        if self._told is not None:
            before, since = self._told
            if who == (before.kind, [state.rank for state in before.ranks]):
                return
            if hang is None:
                self._say(f"{_named(before)}: going on, after {time.monotonic() - since:.0f} s")
        self._told = None if hang is None else (hang, time.monotonic())
        if hang is not None:
            self._say(hang.line + _advice(hang))


def _named(hang: Hang) -> str:
    return ", ".join(state.name for state in hang.ranks[:3]) + (" and more" if len(hang.ranks) > 3 else "")


def _advice(hang: Hang) -> str:
    """For a process of this machine that is stopped: how to let it go on."""
    for state in hang.ranks if hang.kind == "silent" else ():
        if state.host == socket.gethostname() and state.pid != os.getpid():
            with suppress(OSError):
                if re.search(r"^State:\s+T", Path(f"/proc/{state.pid}/status").read_text(), re.MULTILINE):
                    return f"; process {state.pid} is stopped: kill -CONT {state.pid} lets it go on"
    return ""
