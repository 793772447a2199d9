"""Which jobs were submitted for an output folder: `slurm/jobs.json` in it, one entry for each launch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fusemega.errors import UserError
from fusemega.files.json_files import read_json
from fusemega.files.output import write_output

FOLDER = "slurm"
"""Folder in a run's or recipe's output folder: scripts, logs, the settings of the jobs, and `jobs.json`."""

NOTES = "jobs.tsv"
"""What the job scripts themselves write there; of a stage, in a folder of its name."""

_FORMAT = "fusemega-jobs-1"


@dataclass(frozen=True)
class SlurmJob:
    """One job, or one job array.

    Attributes:
        job: Slurm's id.
        name: the name of the job.
        stages: the recipe's stages that it runs: one, or one for each task of an array; none: a training run.
        after: ids of the jobs that must have ended well before.
        log: the file of its output, with Slurm's patterns in it.
    """

    job: str
    name: str
    stages: list[str]
    after: list[str]
    log: str


@dataclass(frozen=True)
class Launch:
    """One `fusemega launch`.

    Attributes:
        version: fusemega's.
        command: the command line.
        seconds: when, since 1970.
        jobs: in the order in which they were submitted.
    """

    version: str
    command: str
    seconds: float
    jobs: list[SlurmJob]

    def ids(self) -> list[str]:
        """The ids of the jobs."""
        return [job.job for job in self.jobs]


def jobs_file(output: Path) -> Path:
    """Where the jobs of an output folder are written down."""
    return output / FOLDER / "jobs.json"


def read_launches(output: Path) -> list[Launch]:
    """The launches of an output folder, oldest first; none where there is no file.

    Raises:
        UserError: the file is something else.
    """
    path = jobs_file(output)
    if not path.exists():
        return []
    said = read_json(path)
    try:
        if said["format"] != _FORMAT:
            raise ValueError
        launches = [Launch(**{**one, "jobs": [SlurmJob(**job) for job in one["jobs"]]}) for one in said["launches"]]
        typed = all(
            all(isinstance(word, str) for word in (job.job, job.name, job.log, *job.stages, *job.after))
            for launch in launches
            for job in launch.jobs
        )
        if not typed or not all(isinstance(one.seconds, (int, float)) for one in launches):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not a list of jobs of this version of fusemega; move it away") from None
    return launches


def newest_jobs(output: Path) -> list[SlurmJob]:
    """The jobs of the newest launch; or the one that a job script has noted since, which somebody submitted by hand.

    Raises:
        UserError: as `read_launches`.
    """
    launches = read_launches(output)
    jobs = launches[-1].jobs if launches else []
    notes = read_notes(output / FOLDER / NOTES)
    noted = notes[-1][2] if notes else ""
    if noted.isdecimal() and all(int(noted) > int(job.job) for job in jobs if job.job.isdecimal()):
        return [SlurmJob(noted, output.name, [], [], "")]
    return jobs


def read_notes(path: Path) -> list[list[str]]:
    """What job scripts have noted (slurm/lib.sh), a line each: start or end, time, job, restarts, progress, nodes or
    verdict. None where there is no file."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [words for line in lines if len(words := line.split("\t")) == 6]


def add_launch(output: Path, launch: Launch) -> None:
    """Adds a launch. Raises as `read_launches` and `write_output`."""
    launches = [*read_launches(output), launch]
    write_output(
        jobs_file(output),
        json.dumps({"format": _FORMAT, "launches": [asdict(one) for one in launches]}, indent=1) + "\n",
    )
