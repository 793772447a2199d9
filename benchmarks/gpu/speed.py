"""Whole training steps at the shapes of real models: SFT and distillation, beside a plain loop of transformers.

Random weights; rows of full length, all supervised, so that neither side has padding. The peer is transformers' Llama
in bf16 with sdpa attention, as this project's local layers have it; its AdamW is torch's fused one, whose moments are
bf16 (this project's are fp32, beside fp32 weights). Both take the same samples from the same weights, so that their
losses agree. The distillation is from the model's own stored rows, ten ids a position.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fusemega.text.order import sample_ids
from fusemega.training.run_file import TrainRun
from gpu.card import Card
from gpu.environment import matrix_rate
from gpu.job import Job
from gpu.models import SEED, SHAPES, Words, model_folder, write_rows
from gpu.report import Report
from gpu.step_cost import synchronisations, top_operations
from gpu.trained import loss_of, opened, run_file, samples, store_rows

WARM_UP, TIMED = 2, 5
LOSS = {"bf16": 2e-2, "fp32": 1e-4}  # nats, between both sides, at every step
GIB = 1 << 30


@dataclass(frozen=True)
class Task:
    """What all arms of a shape have in common.

    Attributes:
        shape: of `SHAPES`.
        model: its folder.
        data: one long text.
        row: tokens of each sample.
        micro, batch: samples of a micro-batch, and of a step.
        lr: in bf16 so small that no weight changes visibly: the peer's bf16 weights lose what this project's fp32 ones
            keep, and the losses are to agree.
    """

    shape: str
    model: Path
    data: Path
    dtype: str
    row: int
    micro: int
    batch: int
    lr: float
    steps: int = WARM_UP + TIMED + 2  # one to count synchronisations in, and one to profile

    def run(self, output: Path, objective: Mapping[str, Any], **model: Any) -> TrainRun:
        """A run file of these sizes."""
        return run_file(
            output,
            self.model,
            self.data,
            objective,
            dtype=self.dtype,
            seq_length=self.row,
            training={
                "train_iters": self.steps,
                "global_batch_size": self.batch,
                "micro_batch_size": self.micro,
            },
            optimizer={"lr": self.lr, "clip_grad": 1.0},
            **model,
        )


def task_of(job: Job, shape: str, folder: Path, **sizes: int) -> Task:
    """The model and a text of a few full rows, made."""
    shape = job.size(shape, "tiny")
    model = model_folder(job.work, shape, job.card)
    sizes = job.size({"row": 4096, "micro": 2, "batch": 8} | sizes, {"row": 64, "micro": 2, "batch": 4})
    words = 4 * sizes["row"] * sizes["batch"]  # a word is a token or more
    data = write_rows(folder / "rows.jsonl", [{"text": Words().take(words)}])
    return Task(shape, model, data, job.size("bf16", "fp32"), lr=job.size(1e-7, 1e-4), **sizes)


def step_flops(shape: str, lengths: list[int]) -> float:
    """Floating-point operations of a step without recomputation: products of layers and head, causal attention.

    Args:
        lengths: of the step's samples, all of whose tokens are supervised.
    """
    s = SHAPES[shape]
    heads, groups, head_dim = (s[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    hidden, layers = s["hidden_size"], s["num_hidden_layers"]
    attention = hidden * head_dim * (2 * heads + 2 * groups)
    matrices = layers * (attention + 3 * hidden * s["intermediate_size"]) + hidden * s["vocab_size"]
    squares = sum(n * n for n in lengths)
    return 6.0 * (matrices * sum(lengths) + layers * heads * head_dim * squares)


@dataclass
class Timed:
    """What an arm's steps were like. Times and memory mean nothing on a CPU."""

    losses: list[float]
    seconds: float
    gib: float
    waits: dict[str, int] | None
    operations: list[dict[str, Any]]


def timed(card: Card, step: Callable[[], float]) -> Timed:
    """`WARM_UP` steps, `TIMED` ones, one to count synchronisations in, and one to profile."""
    losses = [step() for _ in range(WARM_UP)]
    taken = []
    for _ in range(TIMED):
        card.wait()
        started = time.perf_counter()
        losses.append(step())
        card.wait()
        taken.append(time.perf_counter() - started)
    most = card.most() / GIB
    waits = dict(synchronisations(lambda: losses.append(step()))) if card.is_gpu else None
    return Timed(losses, median(taken), most, waits, top_operations(card, lambda: losses.append(step())))


def fusemega(card: Card, run: TrainRun) -> Timed:
    """The arm that `fusemega train` runs."""
    card.free()
    with opened(run) as trainer:
        return timed(card, lambda: loss_of(trainer.step()))


def samples_of(task: Task) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """The samples of each step, ids and mask, in the order in which a run takes them."""
    dataset = samples(task.model, task.data, task.row)
    steps = [sample_ids(number, task.batch, len(dataset), SEED) for number in range(task.steps)]
    chosen = [[dataset[int(i)] for i in ids] for ids in steps]
    return [[(torch.tensor(s.ids).long(), torch.tensor(s.supervised)) for s in step] for step in chosen]


def transformers(card: Card, task: Task, chosen: list[list[tuple[torch.Tensor, torch.Tensor]]]) -> Timed:
    """The peer: a plain loop."""
    from transformers import AutoModelForCausalLM

    card.free()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[task.dtype]
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=dtype, attn_implementation="sdpa").to(card.device)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=task.lr, weight_decay=0.0, fused=True)
    pending = iter(chosen)

    def step() -> float:
        batch = next(pending)
        supervised = sum(int(mask.sum()) for _, mask in batch)
        losses = []
        for start in range(0, len(batch), task.micro):
            input_ids, labels = padded(batch[start : start + task.micro])
            loss = model(
                input_ids=input_ids.to(card.device),
                labels=labels.to(card.device),
                num_items_in_batch=supervised,
                use_cache=False,
            ).loss
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(torch.stack(losses).sum())

    return timed(card, step)


def padded(batch: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels. Only the last sample of a text is shorter than a row; behind its end nothing is supervised."""
    longest = max(len(ids) for ids, _ in batch)
    input_ids, labels = torch.zeros(len(batch), longest).long(), torch.full((len(batch), longest), -100)
    for place, (ids, mask) in enumerate(batch):
        input_ids[place, : len(ids)] = ids
        labels[place, : len(ids)] = torch.where(mask, ids, -100)
    return input_ids, labels


def tell(report: Report, job: Job, arm: str, task: Task, found: Timed, tokens: list[list[int]], rate: float) -> None:
    """Rows of one arm."""
    if not job.real:
        report.not_measured(f"{arm}: tokens/s, MFU, memory, synchronisations", job.why_not)
        report.require(f"{arm}: steps, and a profile", bool(found.operations), len(found.losses), found.operations)
        return
    timed_steps = tokens[WARM_UP : WARM_UP + TIMED]
    flops = median(step_flops(task.shape, lengths) for lengths in timed_steps) / found.seconds
    each = median(sum(lengths) for lengths in timed_steps) / found.seconds
    peak = job.card.peak_tflops
    report.measured(f"{arm}: speed", round(each), "tokens/s", details={"seconds a step": found.seconds})
    if peak is not None:
        report.measured(f"{arm}: MFU, of {peak:g} TFLOP/s", flops / 1e12 / peak)
    report.measured(f"{arm}: share of the rate of a large product, {rate:.0f} TFLOP/s", flops / 1e12 / rate)
    report.measured(f"{arm}: most memory", round(found.gib, 2), "GiB")
    waits = found.waits or {}
    where = ", ".join(f"{place} {count}x" for place, count in sorted(waits.items(), key=lambda item: -item[1])[:4])
    report.measured(f"{arm}: host waits in a step", f"{sum(waits.values())} ({where})", details=waits)
    shown = ", ".join(f"{row['name'][:40]} {100 * row['share']:.0f} %" for row in found.operations[:3])
    report.measured(f"{arm}: most expensive operations", shown, details=found.operations)


def measure(report: Report, job: Job) -> None:
    """The shape is in the part's name: speed-1b, speed-8b."""
    folder = job.folder()
    task = task_of(job, job.name.removeprefix("speed-"), folder)
    chosen = samples_of(task)
    tokens = [[len(ids) for ids, _ in step] for step in chosen]
    rate = matrix_rate(job) if job.real else float("nan")
    curves: dict[str, list[float]] = {}
    with report.case("sft"):
        found = fusemega(job.card, task.run(folder / "sft", {"name": "sft"}, transformer_impl="local"))
        curves["sft"] = found.losses
        tell(report, job, "sft", task, found, tokens, rate)
    with report.case("transformers, sft"):
        found = transformers(job.card, task, chosen)
        tell(report, job, "transformers, sft", task, found, tokens, rate)
        if "sft" in curves:
            apart = max(abs(a - b) for a, b in zip(curves["sft"], found.losses, strict=True))
            both = {"ours": curves["sft"], "transformers": found.losses}
            report.compare("sft: losses beside transformers", apart, LOSS[task.dtype], "nats", both)
    with report.case("distill"):
        started = time.perf_counter()
        store = store_rows(folder / "store", task.model, task.data, dtype=task.dtype, seq_length=task.row, top_k=10)
        if job.real:
            report.measured("teach", round(time.perf_counter() - started, 1), "s, with loading and writing")
        objective = {"name": "distill", "store": str(store)}
        found = fusemega(job.card, task.run(folder / "distill", objective, transformer_impl="local"))
        tell(report, job, "distill", task, found, tokens, rate)
