"""A thread that writes every few seconds what this rank does, into a small file that is replaced as a whole.

The main thread never waits for it. A file system that does not answer holds up the thread alone.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from fusemega.monitoring.ranks import RankState, rank_file
from fusemega.runtime import activity
from fusemega.runtime.console import warn_from_here

_MOST_ERRORS = 20  # lines about a device that are kept


class Heartbeat:
    """Writes the file of one rank, from `start` to `end`.

    Args:
        output_dir: the run's folder.
        rank, world_size, device: who this is.
        seconds: between two writings.
    """

    def __init__(self, output_dir: Path, rank: int, world_size: int, device: str, seconds: float) -> None:
        self._path, self._seconds = rank_file(output_dir, rank), seconds
        self._who = (rank, world_size, socket.gethostname(), os.getpid(), device)
        self._started = self._moved = time.time()
        self._beats, self._moves, self._signature = 0, -1, 0
        self._state: Mapping[str, float] = {}
        self._worst: dict[str, float] = {}
        self._errors: list[str] = []
        self._said = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    def end(self, how: str) -> None:
        """Writes a last time, with how the rank has ended.

        Args:
            how: "finished", "stopped" or "failed: REASON".
        """
        self._stop.set()
        self._thread.join(self._seconds + 5)
        if not self._thread.is_alive():
            self._write(how)

    def remove(self) -> None:
        """Ends without a trace: removes this rank's file, and the folders if they are empty then."""
        self._stop.set()
        self._thread.join(self._seconds + 5)
        with contextlib.suppress(OSError):
            self._path.unlink()
            self._path.parent.rmdir()
            self._path.parent.parent.rmdir()

    def tell(self, readings: Mapping[str, float]) -> None:
        """Adds readings of this rank's device to what is written from now on; for any thread."""
        self._worst = {**self._worst, **{k: max(v, self._worst.get(k, v)) for k, v in readings.items()}}
        self._state = dict(readings)

    def tell_error(self, line: str) -> None:
        """Adds a line about an error of this rank's device; for any thread."""
        self._errors = [*self._errors, line][-_MOST_ERRORS:]

    def _run(self) -> None:
        while True:
            self._write(None)
            if self._stop.wait(self._seconds):
                return

    def _write(self, ended: str | None) -> None:
        now, doing, at = time.time(), activity.current(), activity.place()
        self._beats += 1
        stands = doing.moves == self._moves and at.signature == self._signature
        if not stands:
            self._moved, self._moves, self._signature = now, doing.moves, at.signature
        text = RankState(
            *self._who,
            self._started,
            now,
            self._beats,
            doing.iteration,
            doing.train_iters,
            doing.phase,
            doing.since,
            doing.detail,
            self._moved,
            at.collective if stands and ended is None else "",
            at.code if stands and ended is None else "",
            ended,
            dict(self._state),
            dict(self._worst),
            list(self._errors),
        ).as_json()
        aside = self._path.with_name(f".{self._path.name}.tmp")
        try:
            # Not made durable: a heartbeat is worth nothing after its node has lost power.
            aside.write_text(text + "\n", encoding="utf-8")
            os.replace(aside, self._path)
        except OSError as error:
            if not self._said:
                self._said = True
                warn_from_here(f"rank {self._who[0]}: no heartbeat can be written ({self._path}: {error.strerror})")
