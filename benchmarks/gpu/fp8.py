"""Transformer Engine's layers and FP8 beside bf16: speed and loss curves of the 1B shape on a few rows.

The part `experts` has the shape with experts instead, in bf16: grouped products beside experts one after the other.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from fusemega.runtime.kernel_packages import FP8_RECIPES, recipe_problem
from fusemega.training.run_file import TrainRun
from gpu.job import Job
from gpu.report import Report
from gpu.speed import Task, task_of
from gpu.trained import loss_of, opened

STEPS, WARM_UP, LEARNING_RATE = 40, 3, 1e-4
CURVE = 0.1  # nats: how far a curve may be from that of bf16 local layers at its end
BASE = "bf16, local layers"


def arms(report: Report, experts: bool) -> dict[str, dict[str, Any]]:
    """Name -> settings of section `model`. Recipes that this card cannot run are told; none has experts."""
    found: dict[str, dict[str, Any]] = {BASE: {"transformer_impl": "local"}}
    found["bf16, Transformer Engine"] = {"transformer_impl": "transformer_engine"}
    for recipe in () if experts else FP8_RECIPES:
        if problem := recipe_problem(recipe):
            report.not_measured(f"fp8 hybrid, {recipe}", problem)
        else:
            found[f"fp8 hybrid, {recipe}"] = {"fp8": "hybrid", "fp8_recipe": recipe}
    return found


def measure(report: Report, job: Job) -> None:
    folder = job.folder()
    experts = job.name == "experts"
    task = replace(task_of(job, "moe" if experts else "1b", folder, micro=2, batch=2), steps=STEPS, lr=LEARNING_RATE)
    compare(report, job, task, folder, arms(report, experts))


def compare(report: Report, job: Job, task: Task, folder: Path, settings: dict[str, dict[str, Any]]) -> None:
    """Every arm from the same weights on the same samples."""
    curves: dict[str, list[float]] = {}
    for number, (arm, model) in enumerate(settings.items()):
        with report.case(arm):
            job.card.free()
            losses, speed = steps(job, task, task.run(folder / f"arm-{number}", {"name": "sft"}, **model))
            curves[arm] = losses
            if job.real:
                report.measured(f"{arm}: speed", round(speed), "tokens/s")
                report.measured(f"{arm}: most memory", round(job.card.most() / 2**30, 2), "GiB")
            if arm != BASE and BASE in curves:
                apart = max(abs(a - b) for a, b in zip(losses[-5:], curves[BASE][-5:], strict=True))
                details = {"losses": losses, BASE: curves[BASE]}
                report.compare(f"{arm}: last losses beside {BASE}", apart, CURVE, "nats", details)
            else:
                report.require(f"{arm}: it learns", losses[-1] < losses[0], losses[-1], details=losses)


def steps(job: Job, task: Task, run: TrainRun) -> tuple[list[float], float]:
    """The losses of all steps, and tokens a second behind the first few."""
    losses, rates = [], []
    with opened(run) as trainer:
        for _ in range(task.steps):
            started = time.perf_counter()
            values = trainer.step()
            job.card.wait()
            rates.append(values["tokens"] / (time.perf_counter() - started))
            losses.append(loss_of(values))
    return losses, median(rates[WARM_UP:])
