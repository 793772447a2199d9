"""How far a training run is, from the files in its folder. Needs no Slurm, and no torch."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusemega.checkpoint.series import CHECKPOINTS, latest_checkpoint, read_state
from fusemega.errors import UserError
from fusemega.files.json_files import read_json
from fusemega.monitoring.ranks import find_hang, read_ranks
from fusemega.training.records import DONE_MARKER, METRICS_FILE, RUN_RECORD, THROUGHPUT, TIME, read_metrics

_ROWS = 20
"""The newest rows of metrics that say how fast it is."""


@dataclass(frozen=True)
class Progress:
    """A training run. What is not known is None.

    Attributes:
        state: finished, running (its ranks write heartbeats, or an iteration has just ended), failed, or not running.
        reason: of a failure; or which rank holds up the others, and where.
        iteration, iterations: updates done, and those of the run.
        checkpoint: iteration of the newest whole checkpoint.
        checkpoint_seconds: its age.
        trouble: why checkpoints that are there cannot be read.
        step_seconds: since the last update ended.
        iteration_seconds: of an update, median of the newest.
        tokens_per_second: median of the newest.
        left_seconds: until its end, at this speed.
        loss: of the last update.
    """

    state: str
    reason: str
    iteration: int
    iterations: int | None
    checkpoint: int | None
    checkpoint_seconds: float | None
    trouble: str
    step_seconds: float | None
    iteration_seconds: float | None
    tokens_per_second: float | None
    left_seconds: float | None
    loss: float | None


def is_run(folder: Path) -> bool:
    """Whether it is the folder of a training run that has begun."""
    return (folder / RUN_RECORD).is_file()


def progress_of(folder: Path) -> Progress:
    """How far the run of this folder is.

    Raises:
        UserError: its record or its metrics cannot be read.
    """
    record = read_json(folder / RUN_RECORD)
    rows = read_metrics(folder)
    newest = rows[-_ROWS:]
    ranks = read_ranks(folder)
    checkpoint, age, total, trouble = _checkpoint(folder / CHECKPOINTS)
    iteration = int(rows[-1]["iteration"]) if rows else 0
    each = _median(newest, TIME)
    iterations = _iterations(record, ranks, total)
    finished = (folder / DONE_MARKER).exists()
    since = _age(folder / METRICS_FILE) if rows else None
    state, reason = "not running", ""
    hang = find_hang(ranks)
    failed = [rank for rank in ranks if (rank.ended or "").startswith("failed")]
    if finished:
        state, iteration = "finished", iterations or iteration
    elif failed:
        state, reason = "failed", f"{failed[0].name}: {failed[0].ended}"
    elif any(rank.ended is None for rank in ranks):
        state, reason = "running", "" if hang is None else hang.line
        if hang is not None and hang.kind == "silent" and len(hang.ranks) == len(ranks):
            state, reason = "not running", "its ranks have ended without a word, or all hang"
    elif not ranks and since is not None and each is not None and since < max(60.0, 10 * each):
        state = "running"
    left = None if iterations is None or each is None or finished else (iterations - iteration) * each
    return Progress(
        state,
        reason,
        iteration,
        iterations,
        checkpoint,
        age,
        trouble,
        since,
        each,
        _median(newest, THROUGHPUT),
        left,
        rows[-1].get("lm loss", rows[-1].get("loss")) if rows else None,
    )


def _checkpoint(root: Path) -> tuple[int | None, float | None, int | None, str]:
    """Iteration and age of the newest checkpoint, the updates of its run, and what is wrong with them."""
    try:
        newest = latest_checkpoint(root)
        if newest is None:
            return None, None, None, ""
        said = read_state(newest)
    except UserError as error:
        return None, None, None, str(error)
    total = said.get("train_iters")
    return said["iteration"], _age(newest), total if type(total) is int else None, ""


def _iterations(record: dict[str, Any], ranks: list[Any], total: int | None) -> int | None:
    """The updates of the run: as its ranks say, else its newest checkpoint, else its settings, if those do."""
    if ranks and ranks[0].train_iters:
        return int(ranks[0].train_iters)
    if total is not None:
        return total
    run = record.get("run")
    training = run.get("training") if isinstance(run, dict) else None
    said = training.get("train_iters") if isinstance(training, dict) else None
    return said if type(said) is int else None


def _median(rows: list[dict[str, float]], name: str) -> float | None:
    found = [row[name] for row in rows if name in row]
    return statistics.median(found) if found else None


def _age(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None
