"""What is there: the facts of `fusemega env`, and the rates that the card reaches, by which others are judged."""

from __future__ import annotations

import torch

from fusemega.runtime.environment import BROKEN, examine
from gpu.job import Job
from gpu.report import Report

GIB = 1 << 30


def measure(report: Report, job: Job) -> None:
    facts = examine()
    for fact in facts:
        shown = f"{fact.found}; {fact.note}" if fact.note else fact.found
        if fact.status == BROKEN:
            report.require(fact.name, False, shown)
        else:
            report.fact(fact.name, shown)
    report.fact("device", job.card.name)
    for what, unit, rate in (
        ("products of bf16, 8192 x 8192", "TFLOP/s", matrix_rate),
        ("copies on the card", "GB/s read and written", copy_rate),
        ("copies from pinned memory", "GB/s", transfer_rate),
    ):
        if not job.real:
            report.not_measured(what, job.why_not)
            continue
        with report.case(what):
            report.measured(what, rate(job), unit)
    if job.real and job.card.peak_tflops is None:
        report.not_measured("share of the card's peak", f"the peak of {job.card.name} is not listed in gpu/card.py")


def matrix_rate(job: Job) -> float:
    """TFLOP/s of a large square product of bf16 matrices."""
    size = job.size(8192, 64)
    a, b = (torch.randn(size, size, device=job.card.device).bfloat16() for _ in range(2))
    return 2 * size**3 / job.card.seconds(lambda: a @ b, repeats=10, warm_up=3) / 1e12


def copy_rate(job: Job) -> float:
    size = job.size(2 * GIB, 1 << 10)
    source = torch.zeros(size, dtype=torch.uint8, device=job.card.device)
    target = torch.empty_like(source)
    return 2 * size / job.card.seconds(lambda: target.copy_(source), repeats=5) / 1e9


def transfer_rate(job: Job) -> float:
    size = job.size(GIB, 1 << 10)
    source = torch.zeros(size, dtype=torch.uint8, pin_memory=job.card.is_gpu)
    target = torch.empty(size, dtype=torch.uint8, device=job.card.device)
    return size / job.card.seconds(lambda: target.copy_(source, non_blocking=True), repeats=5) / 1e9
