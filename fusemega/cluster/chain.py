"""A recipe's graph as jobs: one for each stage that has to run, or an array of stages that do not need each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fusemega.pipeline.graph import Graph
from fusemega.pipeline.stage import Stage
from fusemega.pipeline.verdict import StageVerdict


@dataclass(frozen=True)
class StageJob:
    """One job, or one job array.

    Attributes:
        name: of the job.
        stages: what it runs: one stage, or one for each task.
        needs: names of stages in other jobs that must have ended well.
        ranks: whether it runs as a rank for each GPU.
        gpu: whether its one process needs a GPU; of `ranks`, True.
    """

    name: str
    stages: tuple[str, ...]
    needs: tuple[str, ...]
    ranks: bool
    gpu: bool


def jobs_of(graph: Graph, verdicts: Mapping[str, StageVerdict]) -> list[StageJob]:
    """The jobs, each after those that it needs.

    Stages that are finished, or have stopped, get none. Stages of one command that may be an array, and need the same
    others, are one.

    Args:
        graph: the recipe's.
        verdicts: which of its stages would run.
    """
    groups: dict[object, list[Stage]] = {}
    for stage in graph.stages:
        if verdicts[stage.name].action == "run":
            groups.setdefault(_kind(graph, stage, verdicts), []).append(stage)
    jobs = []
    for stages in groups.values():
        first = stages[0]
        needs = tuple(name for name in graph.needs[first.name] if verdicts[name].action == "run")
        name = first.name if len(stages) == 1 else "-".join(first.argv[:-1] or (first.name,))
        jobs.append(StageJob(name, tuple(one.name for one in stages), needs, first.launched, any(map(_on_gpu, stages))))
    return _ordered(jobs)


def _kind(graph: Graph, stage: Stage, verdicts: Mapping[str, StageVerdict]) -> object:
    """Stages with the same are one array. Those with a common set of needs do not need each other."""
    if not stage.may_be_array:
        return stage.name
    needs = frozenset(name for name in graph.needs[stage.name] if verdicts[name].action == "run")
    return (stage.argv[:-1], needs)


def _on_gpu(stage: Stage) -> bool:
    """Whether a model runs in it. A sampler that asks a server needs no GPU; a recipe's function may."""
    if stage.argv[:1] in (("sample",), ("tasks",)):
        return "load" in stage.settings.get("engine", {})
    return stage.launched or bool(stage.function)


def _ordered(jobs: list[StageJob]) -> list[StageJob]:
    """A job goes after those that have what it needs, which an array may have moved behind it."""
    ordered: list[StageJob] = []
    while len(ordered) < len(jobs):
        done = {stage for job in ordered for stage in job.stages}
        ordered.append(next(job for job in jobs if job not in ordered and done.issuperset(job.needs)))
    return ordered


def dependency(job: StageJob, ids: Mapping[str, str]) -> list[str]:
    """The options that make a job wait for others; it is cancelled if one of them fails.

    Args:
        job: the job.
        ids: stage -> Slurm's id of the job, or of the task of an array, that runs it.
    """
    if not job.needs:
        return []
    return [f"--dependency=afterok:{':'.join(ids[name] for name in job.needs)}", "--kill-on-invalid-dep=yes"]
