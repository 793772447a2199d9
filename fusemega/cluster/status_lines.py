"""A status as lines for a terminal: what is going on first, then what to know, then what to type."""

from __future__ import annotations

from fusemega.cluster.progress import Progress
from fusemega.cluster.slurm import clock
from fusemega.cluster.stages import StageState
from fusemega.cluster.status import JobFound, Status


def status_lines(status: Status) -> list[str]:
    """The lines."""
    lines = [_head(status)]
    if status.kind == "recipe":
        lines += _stages(status)
    else:
        lines += [f"  job {job.job}: {_job(job)}" for job in status.jobs]
        if status.run is not None:
            lines += [f"  {line}" for line in _run(status.run, _limit_left(status.jobs))]
    lines += [f"  {line}" for line in status.warnings]
    if status.jobs:
        running = [job for job in status.jobs if job.state is not None and job.state.state == "RUNNING"]
        failed = [job for job in status.jobs if job.failed]
        lines += [f"  log: {job.log}" for job in (running or failed or status.jobs[-1:])[:4] if job.log]
    return lines


def _head(status: Status) -> str:
    if status.run is not None:
        return f"{status.folder}: {_state_of_run(status)}"
    if status.kind == "submitted":
        return f"{status.folder}: submitted; no job has begun to train"
    done = sum(1 for stage in status.stages if stage.state == "finished")
    words = [f"{done} of {len(status.stages)} stages finished"]
    for state in ("running", "waiting", "failed", "stopped", "interrupted"):
        if names := [stage.name for stage in status.stages if stage.state == state]:
            words.append(f"{state}: {', '.join(names)}")
    return f"{status.folder}: {'; '.join(words)}"


def _state_of_run(status: Status) -> str:
    assert status.run is not None
    run, jobs = status.run, [job for job in status.jobs if job.state is not None and job.state.active]
    if run.state == "finished":
        return "finished"
    if jobs and jobs[0].state is not None and jobs[0].state.state != "RUNNING":
        return f"waits in the queue ({jobs[0].state.reason or jobs[0].state.state})"
    return f"{run.state}: {run.reason}" if run.reason else run.state


def _job(job: JobFound) -> str:
    state = job.state
    if state is None:
        known = f"; it ended so: {job.verdict}" if job.verdict else ""
        return f"Slurm knows nothing of it (any more){known}"
    words = state.state + (f" ({state.reason})" if state.reason else "")
    if state.state == "RUNNING":
        words += f" on {state.nodes}"
        if state.seconds is not None:
            words += f" for {clock(state.seconds)}"
        if state.limit is not None:
            words += f" of {clock(state.limit)}"
    elif job.verdict and not state.active:
        words += f"; {job.verdict}"
    return words + (f"; restarted {job.restarts} time(s)" if job.restarts else "")


def _limit_left(jobs: list[JobFound]) -> float | None:
    """Seconds that the running job has left."""
    for job in jobs:
        if job.state is not None and job.state.state == "RUNNING" and job.state.limit and job.state.seconds is not None:
            return max(0.0, job.state.limit - job.state.seconds)
    return None


def _run(run: Progress, limit_left: float | None) -> list[str]:
    of = "" if run.iterations is None else f" of {run.iterations}"
    words = [f"iteration {run.iteration}{of}"]
    if run.loss is not None:
        words.append(f"loss {run.loss:.4g}")
    if run.step_seconds is not None and run.state != "finished":
        words.append(f"the last one ended {clock(run.step_seconds)} ago")
    if run.iteration_seconds is not None:
        words.append(f"{run.iteration_seconds:.3g} s each")
    if run.tokens_per_second is not None:
        words.append(f"{run.tokens_per_second:,.0f} tokens/s")
    lines = [", ".join(words)]
    if run.trouble:
        lines.append(f"checkpoints: {run.trouble}")
    elif run.checkpoint is None:
        lines.append("no checkpoint yet")
    else:
        age = "" if run.checkpoint_seconds is None else f", {clock(run.checkpoint_seconds)} old"
        lines.append(f"last checkpoint: iteration {run.checkpoint}{age}")
    if run.left_seconds is not None:
        line = f"left: {clock(run.left_seconds)} at this speed"
        if limit_left is not None and run.state == "running":
            enough = run.left_seconds < limit_left
            line += f"; the job has {clock(limit_left)} left" + ("" if enough else ", so it will save and be requeued")
        lines.append(line)
    return lines


def _stages(status: Status) -> list[str]:
    jobs = {job.stage: job for job in status.jobs}
    width = max((len(stage.name) for stage in status.stages), default=0)
    lines = []
    for stage in status.stages:
        job = jobs.get(stage.name)
        words = stage.state + (f": {stage.reason}" if stage.reason else "")
        if job is not None and stage.state not in ("finished", "not needed"):
            words += f"  [job {job.job}: {_job(job)}]"
        lines.append(f"  {stage.name:<{width}}  {words}")
        if stage.run is not None and stage.state == "running":
            limit = _limit_left([job] if job is not None else [])
            lines += [f"  {'':<{width}}    {line}" for line in [*_trouble(stage), *_run(stage.run, limit)]]
    return lines


def _trouble(stage: StageState) -> list[str]:
    return [stage.run.reason] if stage.run is not None and stage.run.reason else []
