"""Checkpoints: the card's resumed there and on the CPU, the CPU's on the card. The curves are compared."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from fusemega.training.assembly import train
from fusemega.training.records import read_metrics
from gpu.card import Card
from gpu.elsewhere import on_cpu
from gpu.job import Job
from gpu.models import model_folder, write_chat
from gpu.report import Report
from gpu.trained import run_file

STEPS, SAVED = 4, 2
TRACKER = "latest_checkpointed_iteration.txt"
# Relative, of loss and gradient norm behind the checkpoint. On one device sums of a GPU may be added in another order.
SAME_DEVICE, OTHER_DEVICE = 1e-5, 1e-3


def trained(folder: str, name: str, start: str | None = None) -> list[list[float]]:
    """Loss and gradient norm of each step of run `name`; `start`: the run whose checkpoint `SAVED` it goes on from."""
    work = Path(folder)
    if start is not None:
        shutil.copytree(work / start, work / name)
        shutil.rmtree(work / name / "checkpoints" / f"iter_{STEPS:07d}")
        (work / name / "checkpoints" / TRACKER).write_text(str(SAVED))
    settings = {"train_iters": STEPS, "global_batch_size": 4, "save_interval": SAVED}
    run = run_file(
        work / name,
        work / "model",
        work / "chat.jsonl",
        {"name": "sft"},
        dtype="fp32",
        seq_length=128,
        training=settings,
        optimizer={"adam_eps": 1e-5},
    )
    train(run)
    return [[row["lm loss"], row["grad-norm"]] for row in read_metrics(work / name)]


def apart(curve: list[list[float]], other: list[list[float]]) -> float:
    """The largest relative difference behind the checkpoint; infinite if a step is missing."""
    if len(curve) != STEPS or len(other) != STEPS:
        return float("inf")
    pairs = zip(curve[SAVED:], other[SAVED:], strict=True)
    return max(abs(a - b) / abs(b) for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True))


def measure(report: Report, job: Job) -> None:
    folder = job.folder()
    write_chat(folder / "chat.jsonl", rows=16)
    (folder / "model").symlink_to(model_folder(job.work, "tiny", Card(torch.device("cpu"), "CPU")))
    with report.case("resumed on the same device"):
        whole = trained(str(folder), "whole")
        again = trained(str(folder), "again", "whole")
        report.compare("resumed on the same device", apart(again, whole), SAME_DEVICE, "relative", [whole, again])
    if not job.card.is_gpu:
        for what in ("the card's checkpoint resumed on the CPU", "the CPU's checkpoint resumed on the card"):
            report.not_measured(what, job.why_not)
        return
    with report.case("the card's checkpoint resumed on the CPU"):
        moved = on_cpu(job, trained, folder=str(folder), name="moved", start="whole")
        report.compare("the card's checkpoint resumed on the CPU", apart(moved, whole), OTHER_DEVICE, "relative", moved)
    with report.case("the CPU's checkpoint resumed on the card"):
        cpu = on_cpu(job, trained, folder=str(folder), name="cpu")
        back = trained(str(folder), "back", "cpu")
        error = apart(back, cpu)
        report.compare("the CPU's checkpoint resumed on the card", error, OTHER_DEVICE, "relative", [cpu, back])
