"""Preference pairs with each prompt once in a row (`training.share_prefix`, FlexAttention on a GPU), and twice.

SimPO, which needs no reference, at the 1B shape; prompts of about half and three quarters of a pair's longer text.
Losses of both ways agree, at every step.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

from gpu.job import Job
from gpu.models import model_folder, write_pairs
from gpu.report import Report
from gpu.trained import loss_of, opened, run_file

WARM_UP, TIMED = 3, 4
PAIRS = 16  # of a step
LOSS = {"bf16": 2e-2, "fp32": 1e-4}  # nats


def measure(report: Report, job: Job) -> None:
    folder = job.folder()
    model = model_folder(job.work, job.size("1b", "tiny"), job.card)
    words, pairs = job.size(600, 40), job.size(PAIRS, 4)
    for share in job.size((50, 75), (75,)):
        prompt = words * share // 100
        data = write_pairs(folder / f"{share}.jsonl", 2 * pairs, prompt, words - prompt)
        curves = {}
        for shared in (False, True):
            name = f"prompts of {share} %, {'once in a row' if shared else 'twice'}"
            with report.case(name):
                curves[shared], seconds = steps(job, folder / f"{share}-{shared}", model, data, pairs, shared)
                if job.real:
                    report.measured(f"{name}: speed", round(pairs / seconds, 2), "pairs/s", details=seconds)
                    report.measured(f"{name}: most memory", round(job.card.most() / 2**30, 2), "GiB")
                else:
                    report.not_measured(f"{name}: pairs/s, memory", job.why_not)
            job.card.free()
        if len(curves) == 2:
            apart = max(abs(a - b) for a, b in zip(*curves.values(), strict=True))
            allowed = LOSS[job.size("bf16", "fp32")]
            report.compare(f"prompts of {share} %: losses of both ways", apart, allowed, "nats", list(curves.values()))


def steps(job: Job, output: Path, model: Path, data: Path, pairs: int, shared: bool) -> tuple[list[float], float]:
    """The losses, and the median time of a step behind the warm-up (which compiles)."""
    training = {"train_iters": WARM_UP + TIMED, "global_batch_size": pairs, "share_prefix": shared}
    run = run_file(
        output,
        model,
        data,
        {"name": "simpo"},
        dtype=job.size("bf16", "fp32"),
        seq_length=job.size(4096, 512),
        training=training,
        optimizer={"lr": 1e-6},
        transformer_impl="local",
    )
    losses, taken = [], []
    with opened(run) as trainer:
        for _ in range(WARM_UP + TIMED):
            started = time.perf_counter()
            losses.append(loss_of(trainer.step()))  # reads the loss, and so waits for the card
            job.card.wait()
            taken.append(time.perf_counter() - started)
    return losses, median(taken[WARM_UP:])
