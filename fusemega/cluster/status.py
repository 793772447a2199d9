"""What `fusemega status` finds out of a folder: its jobs, how far it is, what was warned of."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusemega.cluster.jobs_file import FOLDER, NOTES, SlurmJob, newest_jobs, read_notes
from fusemega.cluster.progress import Progress, is_run, progress_of
from fusemega.cluster.slurm import ENDED_WELL, JobState, own_jobs, states_of
from fusemega.cluster.stages import StageState, is_recipe, stages_of
from fusemega.errors import UserError, printable

_COMMENT = "fusemega:"
_LOG_BYTES = 1 << 20
_WARNINGS = 3
_WARNING = re.compile(r"^(?:\[rank \d+\] |\d+: )?((?:warning|error): .*)$")


@dataclass(frozen=True)
class JobFound:
    """A job of the newest launch, or a task of a job array.

    Attributes:
        job: Slurm's id.
        name: of the job.
        stage: the recipe's stage that it runs; "": a training run.
        state: what Slurm says; None where it knows nothing of the job (any more).
        log: the file of its output.
        restarts: starts after the first, in `jobs.tsv`, or as Slurm says.
        verdict: how the job's script said that it ended, "" while it has not.
    """

    job: str
    name: str
    stage: str
    state: JobState | None
    log: str
    restarts: int | None
    verdict: str

    @property
    def failed(self) -> bool:
        """Whether Slurm says that it has ended, and not well."""
        return self.state is not None and not self.state.active and self.state.state != ENDED_WELL


@dataclass(frozen=True)
class Status:
    """A run's or a recipe's folder.

    Attributes:
        folder: as given.
        kind: run, recipe, or submitted (its first job has not begun).
        jobs: of the newest launch; none without one.
        run: of a run.
        stages: of a recipe.
        warnings: the last warnings and errors in the logs of the jobs, or in the log of a run.
    """

    folder: str
    kind: str
    jobs: list[JobFound]
    run: Progress | None
    stages: list[StageState]
    warnings: list[str]

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {"time": time.time(), **asdict(self)}


def status_of(folder: Path) -> Status:
    """What is known of a folder.

    Raises:
        UserError: it is no folder of a run or a recipe; a file in it cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the output_dir of a run or a recipe")
    jobs = _jobs(folder, newest_jobs(folder))
    of_stage = {job.stage: job.state for job in jobs if job.stage and job.state is not None}
    run, stages, kind = None, [], "submitted"
    if is_run(folder):
        run, kind = progress_of(folder), "run"
    elif is_recipe(folder) or any(job.stage for job in jobs):
        stages, kind = stages_of(folder, of_stage), "recipe"
    elif not jobs:
        raise UserError(
            f"{folder}: not the folder of a training run (run.json), of a recipe (stages/), or of submitted jobs "
            f"({FOLDER}/jobs.json)"
        )
    return Status(str(folder), kind, jobs, run, stages, _warnings([Path(job.log) for job in jobs if job.log]))


def folders_in_queue() -> list[Path]:
    """The folders of this user's jobs that `fusemega launch` has submitted."""
    found = [state.comment.removeprefix(_COMMENT) for state in own_jobs() if state.comment.startswith(_COMMENT)]
    return [
        Path(os.path.relpath(folder)) if Path(folder).is_relative_to(Path.cwd()) else Path(folder)
        for folder in dict.fromkeys(found)
    ]


def _jobs(folder: Path, jobs: Sequence[SlurmJob]) -> list[JobFound]:
    states = states_of([job.job for job in jobs])
    found = []
    for job in jobs:
        tasks = [(f"{job.job}_{i}", stage) for i, stage in enumerate(job.stages)]
        several = len(tasks) > 1
        for name, stage in tasks if several else [(job.job, job.stages[0] if job.stages else "")]:
            state = next((one for one in states.get(job.job, []) if not several or _is_task(one.job, name)), None)
            log = job.log.replace("%A_%a", name).replace("%j", job.job) or (state.log if state is not None else "")
            starts, verdict = _own_notes(folder / FOLDER / stage / NOTES, name)
            restarts = starts - 1 if starts else None if state is None else state.restarts
            found.append(JobFound(name, job.name, stage, state, log, restarts, verdict))
    return found


def _is_task(job: str, task: str) -> bool:
    """Whether Slurm's `job`, such as 12_3, or 12_0-3,5 of tasks that wait, is, or has, this task."""
    whole, _, index = task.partition("_")
    of, _, listed = job.partition("_")
    if of != whole:
        return False
    for part in listed.strip("[]").partition("%")[0].split(","):
        first, _, last = part.partition("-")
        if first.isdecimal() and int(first) <= int(index) <= int(last if last.isdecimal() else first):
            return True
    return False


def _own_notes(path: Path, job: str) -> tuple[int, str]:
    """The starts of a job in the notes of its script (slurm/lib.sh), and how its newest start has ended."""
    starts, verdict = 0, ""
    for words in read_notes(path):
        if words[2] == job:
            starts += words[0] == "start"
            verdict = "" if words[0] == "start" else words[5]
    return starts, verdict


def _warnings(logs: Sequence[Path]) -> list[str]:
    """The last of them, each line once."""
    found: dict[str, None] = {}
    for log in logs:
        try:
            with open(log, "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_BYTES))
                text = file.read(_LOG_BYTES).decode("utf-8", "replace")
        except OSError:
            continue
        for line in text.splitlines():
            if hit := _WARNING.match(line):
                found.pop(hit[1], None)
                found[printable(hit[1])[:500]] = None
    return list(found)[-_WARNINGS:]
