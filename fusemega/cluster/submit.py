"""Writes a job's script and settings into the output folder and submits it: all of it, or nothing."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from fusemega import __version__
from fusemega.cluster.jobs_file import FOLDER, Launch, SlurmJob, add_launch, newest_jobs, read_launches
from fusemega.cluster.request import JobRequest
from fusemega.cluster.script import HELPER, Script, quoted, template_text
from fusemega.cluster.slurm import cancel, states_of, submit
from fusemega.errors import UserError
from fusemega.files.lock import locked
from fusemega.files.output import check_writable, write_output

_OWN = "# Written by fusemega"  # how files that it has written for its jobs begin


@dataclass(frozen=True)
class Planned:
    """A job that is to be submitted.

    Attributes:
        name: of the job.
        stages: see `SlurmJob`.
        options: for sbatch, beside those in the script.
        words: arguments of the script.
        needs: names of stages of other jobs before it.
    """

    name: str
    stages: tuple[str, ...]
    options: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Submission:
    """All that one `fusemega launch` writes and submits.

    Attributes:
        output: the run's or recipe's output folder.
        command: the command line, for the script's header and `jobs.json`.
        request: what is asked of Slurm.
        template: see `Script`.
        settings: of the run or recipe, with overrides applied; the jobs read these.
        jobs: each after those that it needs.
        job_name: of a single job; chains name each.
        shape: of a recipe: path and content of the file that says which stages there are.
    """

    output: Path
    command: str
    request: JobRequest
    template: str
    settings: Mapping[str, object]
    jobs: Sequence[Planned]
    job_name: str
    shape: tuple[Path, str] | None = None

    @property
    def folder(self) -> Path:
        """Where the script is written, absolute."""
        return Path(os.path.abspath(self.output)) / FOLDER

    @property
    def settings_file(self) -> Path:
        """The settings that the jobs read."""
        return self.folder / ("run.yaml" if self.template == "train" else "recipe.yaml")

    @property
    def script_file(self) -> Path:
        """The job script."""
        return self.folder / f"{self.template}.sbatch"

    def script(self, alone: bool = False) -> str:
        """The text of the job script.

        Args:
            alone: it writes the other files itself.
        """
        output, site = os.path.abspath(self.output), self.request.site.values
        # Slurm makes no folders: a script that goes alone leaves its log where it is submitted for.
        log = str(Path.cwd() if alone else self.folder).replace("%", "%%")
        options = [f"--job-name={self.job_name}", *self.request.place()]
        options += self.request.ranks() if self.template == "train" else []
        options += ["--requeue", "--open-mode=append", quoted(f"--output={log}/%x-%j.out")]
        options.append(quoted(f"--comment=fusemega:{output}"))
        python = "" if {"PYTHON", "CONTAINER_IMAGE"} & site.keys() else sys.executable
        arguments = [str(self.settings_file), output]
        writes = self._settings() if alone else {}
        ranks, here = self.request.gpus_per_node, Path.cwd()
        script = Script(self.template, options, self.command, self.folder, here, python, ranks, arguments, writes)
        return script.text()

    def files(self) -> dict[Path, str]:
        """Everything that is written, beside `jobs.json`."""
        shape = {} if self.shape is None else dict([self.shape])
        return {**self._settings(), self.script_file: self.script(), **shape}

    def _settings(self) -> dict[Path, str]:
        """What the jobs read: the settings, the site's, and the script that leaves bad nodes out."""
        said = f"{_OWN} {__version__} for its jobs: {self.command}\n"
        found = {self.settings_file: said + yaml.safe_dump(dict(self.settings), sort_keys=False, allow_unicode=True)}
        site = self.folder / "site.env"
        if self.request.site.path is not None:
            found[site] = self.request.site.text
        elif site.exists() and not (old := site.read_text("utf-8", "replace")).startswith(_OWN):
            # Of an earlier launch, or put there by hand; the script would read it.
            found |= {site.with_name("site.env.before"): old, site: f"{said}# Launched without --env-file.\n"}
        found[self.folder / HELPER] = template_text(HELPER)
        return found

    def commands(self) -> Iterator[tuple[Planned, list[str]]]:
        """The jobs with sbatch's words after the options; what they wait for is not in it."""
        for job in self.jobs:
            yield job, [*job.options, str(self.script_file), *job.words]


def refuse_active(output: Path) -> None:
    """Refuses an output folder that jobs of an earlier launch work on, or will.

    Raises:
        UserError: names the job.
    """
    jobs = [job.job for job in newest_jobs(output)]
    for states in states_of(jobs).values():
        for state in states:
            if state.active:
                raise UserError(
                    f"{output}: job {state.job} of an earlier launch is {state.state}; `fusemega status {output}` "
                    f"shows it, `scancel {' '.join(jobs)}` ends what was submitted with it"
                )


def check_place(submission: Submission) -> None:
    """Refuses an output folder in which the script cannot be written. Creates nothing.

    Raises:
        UserError: names what is in the way.
    """
    for path in submission.files():
        if path.is_dir():
            raise UserError(f"{path}: is a folder, where fusemega would write a file; move it away")
    check_writable(submission.folder / "jobs.json")
    read_launches(submission.output)


def check_accepted(submission: Submission) -> None:
    """Asks Slurm whether it would take each job. Nothing is submitted, nothing is left behind.

    Raises:
        UserError: Slurm's reason.
    """
    with tempfile.TemporaryDirectory(prefix="fusemega-sbatch-") as place:
        script = Path(place) / submission.script_file.name
        script.write_text(submission.script(), encoding="utf-8")
        asked: set[tuple[str, ...]] = set()
        for job in submission.jobs:
            if job.options not in asked:
                asked.add(job.options)
                submit([*job.options, str(script), *job.words], f"job {job.name}", test_only=True)


def submit_all(submission: Submission, dependency: Callable[[Planned, Mapping[str, str]], list[str]]) -> list[SlurmJob]:
    """Writes the files, submits the jobs and writes them down. Where one is refused, the others are cancelled and the
    files are as before.

    Args:
        submission: what.
        dependency: a job, and stage -> id of those that are submitted, to the options that make it wait.

    Raises:
        UserError: a job is refused; a file cannot be written; another launch is at work.
    """
    jobs: list[SlurmJob] = []
    ids: dict[str, str] = {}
    files = submission.files()
    with locked(submission.folder), _as_before([*files, submission.folder / "jobs.json"]):
        refuse_active(submission.output)
        for path, text in files.items():
            write_output(path, text)
        try:
            for job, words in submission.commands():
                found = submit([*dependency(job, ids), *words], f"job {job.name}")
                several = len(job.stages) > 1
                ids |= {stage: f"{found}_{i}" if several else found for i, stage in enumerate(job.stages)}
                after = sorted({ids[name].partition("_")[0] for name in job.needs}, key=int)
                log = submission.folder / f"{job.name}-{'%A_%a' if several else '%j'}.out"
                jobs.append(SlurmJob(found, job.name, list(job.stages), after, str(log)))
            add_launch(submission.output, Launch(__version__, submission.command, time.time(), jobs))
        except BaseException:
            cancel([job.job for job in jobs])
            raise
    return jobs


@contextmanager
def _as_before(paths: Sequence[Path]) -> Iterator[None]:
    """If the block fails, these files are what they were, or gone, and folders that it made are gone too."""
    before = {path: path.read_text(encoding="utf-8") if path.is_file() else None for path in paths}
    above = {place for path in paths for place in path.parents}
    missing = sorted((place for place in above if not place.exists()), key=lambda place: -len(place.parts))
    try:
        yield
    except BaseException:
        for path, text in before.items():
            if text is None:
                path.unlink(missing_ok=True)
            else:
                write_output(path, text)
        for place in missing:
            with suppress(OSError):
                place.rmdir()
        raise
