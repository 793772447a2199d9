"""`fusemega launch`: reads and checks a run file or a recipe, shows the plan, and submits it or prints the script."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusemega.cluster.chain import StageJob, dependency, jobs_of
from fusemega.cluster.jobs_file import FOLDER, SlurmJob
from fusemega.cluster.plan import processes, training_plan
from fusemega.cluster.request import JobRequest
from fusemega.cluster.slurm import clock, require_slurm
from fusemega.cluster.submit import Planned, Submission, check_accepted, check_place, refuse_active, submit_all
from fusemega.config import load, read_yaml, validate
from fusemega.errors import UserError
from fusemega.pipeline.graph import Graph
from fusemega.pipeline.record import shape_file, shape_text
from fusemega.pipeline.scope import Scope
from fusemega.pipeline.stage import Stage
from fusemega.pipeline.verdict import plan
from fusemega.recipes.registry import read_recipe
from fusemega.runtime.console import tell
from fusemega.runtime.layout import ParallelConfig
from fusemega.training.assembly import check_output
from fusemega.training.run_file import TrainRun


@dataclass(frozen=True)
class LaunchOrder:
    """What the command line asks for.

    Attributes:
        file: a run file or a recipe.
        overrides: `a.b=c` words.
        request: what is asked of Slurm.
        command: the command line, as a shell would read it.
        quick: open neither models nor data.
        until: of a recipe: the last stage, or the beginning of several names; None: all.
    """

    file: Path
    overrides: tuple[str, ...]
    request: JobRequest
    command: str
    quick: bool = False
    until: str | None = None


def launch(order: LaunchOrder, printing: bool, show: Callable[[str], None]) -> None:
    """Checks, shows the plan, and submits; or writes the script to stdout.

    Args:
        order: what.
        printing: submit nothing and write nothing.
        show: takes the lines of the plan.

    Raises:
        UserError: anything that a job would refuse, or Slurm; nothing is submitted or written then.
    """
    if not printing:
        require_slurm()
    values = read_yaml(order.file, order.overrides)
    is_recipe = _is_recipe(values)
    if order.until is not None and not is_recipe:
        raise UserError(f"--until {order.until}: {order.file} is a run file and has no stages; leave it out")
    submission, chain = _of_recipe(order, show) if is_recipe else (_of_run(order, values, show), {})
    if submission is None:
        return
    check_place(submission)

    def waits(job: Planned, ids: Mapping[str, str]) -> list[str]:
        return dependency(chain[job.name, job.stages], ids) if chain else []

    if printing:
        _print(submission, waits)
        return
    refuse_active(submission.output)
    check_accepted(submission)
    jobs = submit_all(submission, waits)
    for line in _next(submission.output, jobs):
        tell(line)


def _is_recipe(values: Mapping[str, Any]) -> bool:
    """A recipe names its kind, or is one of kind `fuse`; a run file has an objective."""
    return "recipe" in values or ("objective" not in values and ("sources" in values or "target" in values))


def _of_run(order: LaunchOrder, values: dict[str, Any], show: Callable[[str], None]) -> Submission | None:
    run, request = load(TrainRun, order.file, order.overrides), order.request
    output = Path(run.output_dir)
    if order.quick:
        _check_layout(run, request)
        check_output(output)
        lines, is_left = {"processes": processes(request), "layout": str(run.parallel), "output": str(output)}, True
    else:
        lines, is_left = training_plan(run, request)
    for name, line in lines.items():
        show(f"{name:<11} {line}")
    if not is_left:
        show(f"nothing to do: {output} is finished")
        return None
    name = _job_name(output)
    return Submission(output, order.command, request, "train", values, [Planned(name, ())], name)


def _check_layout(run: TrainRun, request: JobRequest) -> None:
    try:
        run.parallel.data_parallel_size(request.world_size)
    except UserError as error:
        raise UserError(f"--nodes {request.nodes} --gpus-per-node {request.gpus_per_node}: {error}") from None


def _of_recipe(
    order: LaunchOrder, show: Callable[[str], None]
) -> tuple[Submission | None, dict[tuple[str, tuple[str, ...]], StageJob]]:
    """The chain; and its jobs by name and stages."""
    request = order.request
    given = read_yaml(order.file, order.overrides)
    world = request.world_size
    if any(word.partition("=")[0] == "nproc" for word in order.overrides) and given.get("nproc") != world:
        asked = f"--nodes {request.nodes} x --gpus-per-node {request.gpus_per_node}"
        raise UserError(f"nproc={given.get('nproc')}: {asked} gives {world} processes; leave nproc out")
    values = {**given, "nproc": world}
    recipe, _ = read_recipe(order.file, order.overrides)
    settings = validate(recipe.Settings, values, order.file)
    graph = recipe.graph(settings)
    output = Path(settings.output_dir)
    _refuse_own_folder(graph, output)
    verdicts = plan(graph, Scope.of(graph, order.until, None))
    jobs = jobs_of(graph, verdicts)
    show(f"{'processes':<11} {processes(request)}, where a stage runs as several")
    show(f"{'output':<11} {output}")
    done = sum(1 for one in verdicts.values() if one.action == "skip")
    limit = f"each of {clock(request.seconds)} at most"
    show(f"{'stages':<11} {len(verdicts)}, {done} finished; {len(jobs)} job(s), {limit}:")
    planned, chain = [], {}
    for job in jobs:
        options = (f"--job-name={job.name}", *(request.ranks() if job.ranks else request.single(job.gpu)))
        if len(job.stages) > 1:
            options += (f"--array=0-{len(job.stages) - 1}",)
            options += (_array_log(output, job.name),)
        one = Planned(job.name, job.stages, options, job.stages, job.needs)
        planned.append(one)
        chain[job.name, job.stages] = job
        show(_job_line(job))
        for stage in (one for one in graph.stages if one.name in job.stages and "training" in one.settings):
            show(f"    {_arithmetic(stage, world)}")
    for name, one_verdict in verdicts.items():
        if one_verdict.action in ("stop", "wait"):
            show(f"  {name}: no job: {one_verdict.reason}")
    if not planned:
        show(f"nothing to do: no stage of {output} has to run")
        return None, {}
    shape = (shape_file(Path(os.path.abspath(output))), shape_text(graph))
    return Submission(output, order.command, request, "stage", values, planned, _job_name(output), shape), chain


def _refuse_own_folder(graph: Graph, output: Path) -> None:
    own = Path(os.path.abspath(output / FOLDER))
    for stage in graph.stages:
        for path in stage.owned():
            if path == own or own in path.parents:
                raise UserError(f"stage {stage.name} writes {path}, where the job scripts would be: {own}")


def _job_line(job: StageJob) -> str:
    kind = "all processes" if job.ranks else f"one process{', one GPU' if job.gpu else ''}"
    several = f", array of {len(job.stages)}: {', '.join(job.stages)}" if len(job.stages) > 1 else ""
    after = f"; after {', '.join(job.needs)}" if job.needs else ""
    return f"  {job.name}: {kind}{several}{after}"


def _arithmetic(stage: Stage, world_size: int) -> str:
    """Of a stage that trains: how its updates are shared."""
    layout = ParallelConfig(**stage.settings.get("parallel", {}))
    dp, batch = layout.data_parallel_size(world_size), stage.settings["training"]["global_batch_size"]
    return f"{stage.name}: {layout} x DP {dp}, {batch} samples (or groups) an update"


def _array_log(output: Path, name: str) -> str:
    return f"--output={str(Path(os.path.abspath(output)) / FOLDER).replace('%', '%%')}/%x-%A_%a.out"


def _job_name(output: Path) -> str:
    """Of the output folder; what Slurm and file names take."""
    return re.sub(r"[^\w.-]", "-", output.name or "fusemega")


def _print(submission: Submission, waits: Callable[[Planned, Mapping[str, str]], list[str]]) -> None:
    """The script on stdout, with the settings in it; below its first line, how it is submitted."""
    first, _, rest = submission.script(alone=True).partition("\n")
    ids = {stage: f"ID_OF_{job.name}" for job in submission.jobs for stage in job.stages}
    script = str(submission.script_file)
    lines = [first, "# Not submitted yet. Saved as SCRIPT, it is submitted so:"]
    for job, words in submission.commands():
        told = ["SCRIPT" if word == script else word for word in words]
        lines.append(f"#     sbatch {shlex.join([*waits(job, ids), *told])}")
    print("\n".join([*lines, rest]), end="")


def _next(output: Path, jobs: list[SlurmJob]) -> list[str]:
    """What was submitted, and what to type next."""
    width = max(len(job.name) for job in jobs)
    lines = [f"submitted   {job.name:<{width}}  job {job.job}" for job in jobs]
    log = jobs[0].log.replace("%j", jobs[0].job).replace("%A_%a", f"{jobs[0].job}_0")
    return [*lines, "", f"    fusemega status {shlex.quote(str(output))}", f"    tail -F {shlex.quote(log)}"]
