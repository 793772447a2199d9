"""Where a run's numbers go: the console, `metrics.jsonl` and TensorBoard, under Megatron's names."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from fusemega.checkpoint.output import write_durably

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """One row an iteration. Only the main process holds one.

    After a resume, rows and events of iterations that will be repeated are dropped first, so that the files read as
    those of an uninterrupted run.

    Args:
        folder: the run's output folder; `metrics.jsonl` and `tensorboard/` are written there.
        iteration: the iteration the run starts or resumes from; 0 for a fresh run.
        train_iters: the last iteration, for the time left.
        log_interval: console lines are this many iterations apart.
        print_line: where console lines go.
    """

    def __init__(self, folder: Path, iteration: int, train_iters: int, log_interval: int, print_line: Any) -> None:
        self._path = folder / METRICS_FILE
        _keep_rows_through(self._path, iteration)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115  (closed by `close`)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=iteration + 1)
        self._start_iteration, self._train_iters, self._log_interval = iteration, train_iters, log_interval
        self._print = print_line
        self._started = time.monotonic()

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        """Record `values` of 1-based `iteration`. Flushed at once: a killed run keeps its rows."""
        self._file.write(json.dumps({"iteration": iteration, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, iteration)
        if iteration % self._log_interval == 0 or iteration == self._train_iters:
            self._print(self._line(iteration, values))

    def close(self) -> None:
        self._file.close()
        self._board.close()

    def _line(self, iteration: int, values: Mapping[str, float]) -> str:
        done = iteration - self._start_iteration
        left = (time.monotonic() - self._started) / done * (self._train_iters - iteration)
        shown = [f"{name} {_number(value)}" for name, value in values.items() if name != "consumed-samples"]
        total = self._train_iters
        return f"iteration {iteration:>{len(str(total))}}/{total} | {' | '.join(shown)} | left {_clock(left)}"


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's `metrics.jsonl`; a last line cut short by a kill is left out."""
    rows = []
    path = folder / METRICS_FILE
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _keep_rows_through(path: Path, iteration: int) -> None:
    kept = [row for row in read_metrics(path.parent) if row["iteration"] <= iteration]
    write_durably(path, "".join(json.dumps(row) + "\n" for row in kept))


def _number(value: float) -> str:
    return f"{value:.3e}" if value and (abs(value) < 1e-3 or abs(value) >= 1e5) else f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
