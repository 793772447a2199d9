"""Runs parts one after the other, each in a process of its own, which may fail, die or hang without harm to another."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fusemega.runtime.lifeline import child_environment
from gpu.registry import Part
from gpu.report import NOT_MEASURED, WRONG, Row, read_rows

BENCHMARKS = Path(__file__).resolve().parents[1]
_LEAST = 5.0  # seconds; with less left a part is not begun
_SLACK = 5  # times a limit, in the miniature


@dataclass(frozen=True)
class Result:
    """One part, as it ended.

    Attributes:
        end: "done", or how it ended otherwise.
        rows: what it found until then; the last says how it ended, unless it is done.
        seconds: that it took.
        log: the file with all that it printed.
    """

    part: Part
    end: str
    rows: list[Row]
    seconds: float
    log: str

    @property
    def wrong(self) -> int:
        """How many of its rows are wrong."""
        return sum(row.verdict == WRONG for row in self.rows)


def run_parts(
    parts: Sequence[Part], folder: Path, quick: bool, seconds: float, tell: Callable[[list[Result]], None]
) -> list[Result]:
    """All parts, in order.

    Args:
        folder: gets `NAME.jsonl` and `NAME.log` of each part; what parts share lies in `work/` there.
        seconds: for all of them. A part that would not begin before is not measured.
        tell: called with the results so far, after each part.
    """
    end = time.monotonic() + seconds
    results: list[Result] = []
    (folder / "work").mkdir(parents=True, exist_ok=True)
    for part in parts:
        left = end - time.monotonic()
        if left < _LEAST:
            why = f"the {seconds / 60:g} minutes of the whole check were over"
            results.append(Result(part, "not begun", [Row("all", NOT_MEASURED, why)], 0.0, ""))
        else:
            # A miniature says nothing of time, and may run on a busy machine.
            results.append(_run(part, folder, quick, min(part.limit * (_SLACK if quick else 1), left)))
        tell(results)
    return results


def _run(part: Part, folder: Path, quick: bool, limit: float) -> Result:
    rows, log = folder / f"{part.name}.jsonl", folder / f"{part.name}.log"
    rows.unlink(missing_ok=True)
    command = [sys.executable, "-m", "gpu.worker", part.module, part.name, str(folder), str(limit), *part.needs]
    started = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command + (["--quick"] if quick else []),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=child_environment() | {"PYTHONPATH": search_path(), "PYTHONWARNINGS": "ignore"},
            start_new_session=True,  # so that it ends together with all processes that it has started
        )
    try:
        status = process.wait(limit)
        end = _ending(status)
    except subprocess.TimeoutExpired:
        end = f"ran past its limit of {limit:.0f} s"
    finally:
        _end_group(process)
    found = read_rows(rows)
    if end != "done":
        found.append(Row("the part itself", WRONG, f"{end}; {_last_words(log)}"))
    return Result(part, end, found, round(time.monotonic() - started, 1), str(log))


def search_path() -> str:
    """PYTHONPATH of a process that imports the parts, the benchmarks and this project."""
    return os.pathsep.join(filter(None, [str(BENCHMARKS), str(BENCHMARKS.parent), os.environ.get("PYTHONPATH")]))


def _ending(status: int) -> str:
    if status == 0:
        return "done"
    if status < 0:
        try:
            return f"was killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"was killed by signal {-status}"
    return f"failed with status {status}"


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends the part and what it has started. What is stuck in the driver cannot end: it is not waited for."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)


def _last_words(log: Path) -> str:
    """Where a part hung, by the traceback that `worker` writes before the limit; else the last line of its log."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    heads = [place for place, line in enumerate(lines[:-1]) if "most recent call first" in line]
    if heads:  # the main thread is the last
        return f"it was in {lines[heads[-1] + 1][:300]}"
    return f"last line of its log: {lines[-1][:300] if lines else 'nothing'}"
