"""Slurm's commands: submit, cancel, and what it knows of a job. Nothing here knows what the jobs do."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from fusemega.errors import UserError

_SECONDS = 60  # that a command of Slurm may take
_WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
ACTIVE = (*_WAITING, "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT")
ENDED_WELL = "COMPLETED"


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job, or of a task of a job array.

    Attributes:
        job: its id; of a task, `ID_INDEX`.
        state: Slurm's word, such as PENDING, RUNNING, COMPLETED, FAILED, TIMEOUT, CANCELLED.
        reason: Slurm's word for why it waits or has ended; "" for none.
        restarts: how often it was requeued; None: not known.
        seconds: how long it has run, since its last start.
        limit: its time limit, seconds; None: none, or not known.
        nodes: Slurm's list of its nodes.
        work_dir: the folder that it was submitted in.
        comment: its comment.
        log: the file that its output goes to.
    """

    job: str
    state: str
    reason: str = ""
    restarts: int | None = None
    seconds: int | None = None
    limit: int | None = None
    nodes: str = ""
    work_dir: str = ""
    comment: str = ""
    log: str = ""

    @property
    def active(self) -> bool:
        """Whether it waits, runs, or will run again."""
        return self.state in ACTIVE


def has_slurm() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("sbatch") is not None


def require_slurm() -> None:
    """Refuses to go on without Slurm.

    Raises:
        UserError: says what can be done instead.
    """
    if not has_slurm():
        raise UserError(
            "sbatch: not found: this machine has no Slurm, or it is not in PATH; submit on a login node, write the "
            "script with --print, or run here with `fusemega train --nproc N` or `fusemega run`"
        )


def submit(words: Sequence[str], what: str, test_only: bool = False) -> str:
    """`sbatch` with these words.

    Args:
        words: options, the script, its arguments.
        what: the job, for messages.
        test_only: only ask whether Slurm would take it.

    Returns:
        The job's id; "" for a test.

    Raises:
        UserError: Slurm refuses it; it names the job and gives Slurm's reason.
    """
    extra = ["--test-only"] if test_only else ["--parsable"]
    done = _run(["sbatch", *extra, *words])
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"status {done.returncode}"]
        reasons = "; ".join(re.sub(r"^(sbatch|allocation failure): ?(error: )?", "", line.strip()) for line in lines)
        raise UserError(f"{what}: sbatch refuses it: {reasons}")
    return "" if test_only else done.stdout.strip().partition(";")[0]


def cancel(jobs: Sequence[str]) -> None:
    """`scancel` of jobs, which may have ended."""
    if jobs:
        _run(["scancel", *jobs])


def states_of(jobs: Sequence[str]) -> dict[str, list[JobState]]:
    """Job id -> its state, or those of its tasks; no entry for a job that Slurm knows nothing of (any more).

    `scontrol` knows jobs that wait, run, or ended some minutes ago; `sacct` the others, where Slurm keeps accounts.
    """
    found: dict[str, list[JobState]] = {}
    if not has_slurm():
        return found
    for job in jobs:
        done = _run(["scontrol", "-o", "show", "job", job])
        if done.returncode == 0 and (states := [_of_scontrol(line) for line in done.stdout.splitlines() if line]):
            found[job] = states
    missing = [job for job in jobs if job not in found]
    if missing and shutil.which("sacct"):
        fields = "JobID,State,Reason,ElapsedRaw,TimelimitRaw,NodeList,WorkDir"
        done = _run(["sacct", "-n", "-P", "-X", "-j", ",".join(missing), "-o", fields])
        for line in done.stdout.splitlines() if done.returncode == 0 else []:
            if (state := _of_sacct(line)) is not None and (job := state.job.partition("_")[0]) in missing:
                found.setdefault(job, []).append(state)
    return found


def own_jobs() -> list[JobState]:
    """This user's jobs in the queue.

    Raises:
        UserError: Slurm does not answer.
    """
    done = _run(["squeue", "-h", "--me", "-o", "%F"])
    if done.returncode:
        raise UserError(f"squeue: {done.stderr.strip() or done.returncode}")
    ids = list(dict.fromkeys(done.stdout.split()))
    return [state for states in states_of(ids).values() for state in states]


def seconds_of(text: str) -> int | None:
    """Slurm's duration in seconds: MIN, MIN:SEC, HOURS:MIN:SEC, DAYS-HOURS[:MIN[:SEC]]. None: it is none.

    >>> seconds_of("90"), seconds_of("1:30:00"), seconds_of("2-12"), seconds_of("UNLIMITED")
    (5400, 5400, 216000, None)
    """
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", text) or len(text) > 20:
        return None
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(parts) == 3:
        return (parts[0] * 60 + parts[1]) * 60 + parts[2]
    return parts[0] * 60 + (parts[1] if len(parts) == 2 else 0)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, and days where there are some.

    >>> clock(7384), clock(190000)
    ('2:03:04', '2-04:46:40')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}-{hour:02d}:{minute:02d}:{second:02d}" if days else f"{hour}:{minute:02d}:{second:02d}"


def _run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=_SECONDS)
    except FileNotFoundError:
        raise UserError(f"{words[0]}: not found") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{words[0]}: Slurm has not answered for {_SECONDS} s; `sinfo` shows if it is up") from None


def _of_scontrol(line: str) -> JobState:
    def of(key: str) -> str:
        hit = re.search(rf"(?:^| ){key}=(.*?)(?= [A-Za-z][\w:/]*=|$)", line)
        said = hit[1].strip() if hit else ""
        return "" if said in ("(null)", "None", "N/A") else said

    job = of("JobId")
    if of("ArrayJobId"):
        job = f"{of('ArrayJobId')}_{of('ArrayTaskId')}"
    restarts = of("Restarts")
    return JobState(
        job,
        of("JobState"),
        of("Reason"),
        int(restarts) if restarts.isdecimal() else None,
        seconds_of(of("RunTime")),
        seconds_of(of("TimeLimit")),
        of("NodeList"),
        of("WorkDir"),
        of("Comment"),
        of("StdOut"),
    )


def _of_sacct(line: str) -> JobState | None:
    words = line.split("|")
    if len(words) != 7:
        return None
    job, state, reason, seconds, limit, nodes, work_dir = words
    return JobState(
        job,
        state.partition(" ")[0],  # "CANCELLED by 1000"
        "" if reason in ("None", "") else reason,
        None,
        int(seconds) if seconds.isdecimal() else None,
        int(limit) * 60 if limit.isdecimal() else None,
        "" if nodes == "None assigned" else nodes,
        work_dir,
    )
