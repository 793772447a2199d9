"""How far a recipe is, from the records in its folder. Needs no Slurm, and not the recipe file."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fusemega.cluster.progress import Progress, is_run, progress_of
from fusemega.cluster.slurm import JobState
from fusemega.files.lock import holder_of
from fusemega.pipeline.record import StageRecord, read_shape, record_at


@dataclass(frozen=True)
class StageState:
    """One stage.

    Attributes:
        name: of the stage.
        state: finished, stopped, failed, running, interrupted, not needed, waiting, or not begun.
        reason: of a failure or a stop; or what it waits for.
        seconds: since its record was written: of one that runs, since it began.
        job: Slurm's id of its job, "" without one.
        run: of one that trains, how far that is.
    """

    name: str
    state: str
    reason: str
    seconds: float | None
    job: str = ""
    run: Progress | None = None


def is_recipe(folder: Path) -> bool:
    """Whether it is the output folder of a recipe of which a stage has begun."""
    return (folder / "stages").is_dir()


def stages_of(folder: Path, jobs: Mapping[str, JobState]) -> list[StageState]:
    """The stages of a recipe's folder, in the graph's order.

    Args:
        folder: the output folder.
        jobs: stage -> what Slurm says of its job; none where Slurm does not know, or there is none.

    Raises:
        UserError: a record cannot be read.
    """
    needs = read_shape(folder)
    found: dict[str, StageState] = {}
    names = list(needs) or sorted(path.stem for path in (folder / "stages").glob("*.json") if path.stem[0] != ".")
    records = {name: record_at(folder / "stages" / f"{name}.json") for name in dict.fromkeys([*names, *jobs])}
    everything = next((n for n, r in records.items() if r is not None and r.state == "stopped" and r.everything), "")
    for name, record in records.items():
        before = [found[need] for need in needs.get(name, []) if need in found]
        holder = holder_of(folder / "stages" / name)
        state, reason = _state(record, jobs.get(name), before, everything, holder)
        run = _run_of(folder, record) if record is not None and state != "finished" else None
        job = jobs[name].job if name in jobs else ""
        found[name] = StageState(name, state, reason, _age(folder / "stages" / f"{name}.json"), job, run)
    return list(found.values())


def _state(
    record: StageRecord | None, job: JobState | None, before: list[StageState], everything: str, holder: str
) -> tuple[str, str]:
    if record is not None and record.state in ("finished", "stopped"):
        return record.state, record.reason
    if job is not None and job.active:
        if job.state in ("RUNNING", "COMPLETING"):
            return "running", ""
        return "waiting", job.reason
    if record is not None and record.state == "failed":
        return "failed", record.reason
    ended = [one.name for one in before if one.state in ("stopped", "not needed")]
    if ended or (everything and record is None):
        return "not needed", f"{(ended or [everything])[0]} stopped"
    if job is not None and job.state not in ("COMPLETED", "CANCELLED", "REVOKED"):
        return "failed", f"job {job.job} ended: {job.state}{f' ({job.reason})' if job.reason else ''}"
    if failed := [
        one.name
        for one in before
        if one.state in ("failed", "interrupted") or (one.state == "not begun" and one.reason)
    ]:
        return "not begun", f"it needs {failed[0]}"
    if job is not None and job.state == "CANCELLED":
        return ("interrupted" if record is not None else "not begun"), f"job {job.job} was cancelled"
    if record is not None and record.state == "begun":
        return ("running", holder) if holder else ("interrupted", "")
    return "not begun", "it is to run again" if record is not None else ""


def _run_of(folder: Path, record: StageRecord) -> Progress | None:
    for owned in record.owns:
        place = Path(os.path.normpath(folder / owned))
        if is_run(place):
            return progress_of(place)
    return None


def _age(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None
