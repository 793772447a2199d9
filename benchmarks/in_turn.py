"""Programs that take steps in turn, each in a process of its own: a request of one is answered before another starts.

A side answers each line of its stdin, a request in JSON, with a line of JSON on its original stdout; what it prints
goes to its log. The first line that it writes says that it is ready.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO


class Side:
    """One side's process: this Python with the words of `command`, and `log` for what it prints."""

    def __init__(self, command: list[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        root = Path(__file__).resolve().parents[1]
        path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        settings = {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=os.environ | settings | dict(environment or {}),
                text=True,
            )

    def answer(self) -> Any:
        """Waits for the next line. Ends this program with the side's last output if it has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()  # -9: often the system, for want of memory
            raise SystemExit(f"{self.log.name} ended with status {status}:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def step(self, number: int, threads: int) -> dict[str, float]:
        """Asks for a step and waits for what it found."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"step": number, "threads": threads}) + "\n")
        self.process.stdin.flush()
        found: dict[str, float] = self.answer()
        return found

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Requests:
    """In a side: the other end. Made before anything is printed."""

    def __init__(self) -> None:
        self._answers: TextIO = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def ready(self) -> None:
        """Says that requests may come."""
        self.answer("ready")

    def next(self) -> dict[str, int] | None:
        """The next request, with its number of threads set; None at the end."""
        line = sys.stdin.readline()
        if not line:
            return None
        request: dict[str, int] = json.loads(line)
        import torch

        torch.set_num_threads(request["threads"])
        return request

    def answer(self, found: Any) -> None:
        """Writes a line."""
        print(json.dumps(found), file=self._answers, flush=True)

    def serve(self, step: Callable[[int], float]) -> None:
        """Answers every request with what `step` returns as `loss`, the seconds that it took, and the peak memory.

        `seconds` are of the clock, `cpu_seconds` of the processor: with one thread, what others do hardly moves them.
        """
        self.ready()
        while (request := self.next()) is not None:
            started, used = time.perf_counter(), time.process_time()
            loss = step(request["step"])
            took = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}
            self.answer({**took, "loss": loss, "peak_mib": peak_mib()})


def peak_mib() -> float:
    """The most memory that this process has held at once."""
    import torch

    from fusemega.runtime.memory import peak_memory

    return peak_memory(torch.device("cpu")) / 2**20
