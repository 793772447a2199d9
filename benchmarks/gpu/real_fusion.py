"""Is fusion worth it on real weights: a cut SmolLM2 taught by labels alone, and by the whole model's rows too.

The recipe is the quickstart's (target: SmolLM2-135M-Instruct without four layers; ten ids a position; lambda 0.1), on
all text of its four kinds, again and again until the tokens or half of the time are used up; `fused` takes as many
steps as `control` did. The curves are bits per byte of held-out text. Without the weights, or on a CPU, two tiny
models stand for them, and only show that it runs.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from fusemega.fixtures import data as assets
from fusemega.fixtures.packages import AssetMissing
from fusemega.hf.cut_layers import cut_layers
from fusemega.runtime.parallel import ParallelConfig, initialize
from fusemega.scoring.evaluation import evaluate_model
from fusemega.text.dataset import TokenizedDataset
from fusemega.training.trainer import Trainer
from gpu.card import Card
from gpu.job import Job
from gpu.models import model_folder, write_chat
from gpu.report import NotHereError, Report
from gpu.trained import opened, run_file, samples, store_rows

CUT_LAYERS = (5, 14, 17, 18)  # of SmolLM2: chosen one by one, each time the cheapest on three conversations
TOKENS, SECONDS = 20_000_000, 120.0  # of each arm; of both arms together
EVALUATIONS = 20  # of each arm


def measure(report: Report, job: Job) -> None:
    folder = job.folder()
    if job.real:
        try:
            teacher, texts = assets.smollm2(), real_texts()
        except AssetMissing as error:
            raise NotHereError(str(error)) from None
    else:
        report.not_measured("control and fused on SmolLM2", job.why_not)
        teacher, texts = model_folder(job.work, "tiny", Card(job.card.device, "CPU"), num_hidden_layers=4), {}
        texts = {"chat": (write_chat(folder / "train.jsonl", 24), write_chat(folder / "held_out.jsonl", 4))}
    target = folder / "target"
    cut_layers(teacher, target, job.size(CUT_LAYERS, (2,)), initialize(ParallelConfig()))
    train = [str(each) for each, _ in texts.values()]
    sizes: dict[str, Any] = {"dtype": job.size("bf16", "fp32"), "seq_length": job.size(2048, 128)}
    started = time.monotonic()
    store = store_rows(folder / "store", teacher, train, top_k=10, **sizes)
    if job.real:
        report.measured("teach, all training text", round(time.monotonic() - started, 1), "s")
    objectives: dict[str, dict[str, Any]] = {
        "control": {"name": "sft"},
        "fused": {"name": "distill", "store": str(store), "lambda": 0.1},
    }
    training = {"train_iters": 1_000_000, "global_batch_size": job.size(64, 4), "micro_batch_size": job.size(4, 1)}
    held_out = {kind: samples(target, path, sizes["seq_length"]) for kind, (_, path) in texts.items()}
    tokens, seconds, evaluations = job.size((TOKENS, SECONDS, EVALUATIONS), (300, 60.0, 1))
    curves: dict[str, Curve] = {}
    for arm, objective in objectives.items():
        optimizer = {"lr": 1e-4, "adam_beta2": 0.95, "clip_grad": 1.0}
        run = run_file(folder / arm, target, train, objective, training=training, optimizer=optimizer, **sizes)
        job.card.free()
        with opened(run) as trainer:
            # The second arm goes as far as the first, however long that takes.
            points = len(curves["control"]) if curves else 1 + evaluations
            limit = float("inf") if curves else seconds / 2
            curves[arm] = curve_of(trainer, held_out, tokens / evaluations, points, limit)
        if job.real:  # at once, in case the other arm fails
            report.measured(f"{arm}: measurements", len(curves[arm]), f"of {1 + evaluations}", curves[arm])
    tell(report, job, curves)


def real_texts() -> dict[str, tuple[Path, Path]]:
    """Kind of text -> files to train on and to measure on."""
    chat = assets.chat_data()
    domains = {kind: assets.domain_data(kind) for kind in assets.DOMAINS}
    return {"chat": (chat.train, chat.held_out)} | {kind: (d.train, d.held_out) for kind, d in domains.items()}


Curve = list[dict[str, float]]  # tokens so far, and bits per byte of each kind


def curve_of(
    trainer: Trainer, held_out: dict[str, TokenizedDataset], share: float, points: int, seconds: float
) -> Curve:
    """Trains on `share` tokens at a time and measures in between: `points` times, or fewer when the time is up."""
    curve: Curve = [{"tokens": 0.0, **bits(trainer, held_out)}]
    began = time.monotonic()
    while len(curve) < points and (len(curve) < 2 or time.monotonic() - began < seconds):
        done = curve[-1]["tokens"]
        while done < len(curve) * share:
            done += trainer.step()["tokens"]
        curve.append({"tokens": done, **bits(trainer, held_out)})
        print(curve[-1], flush=True)
    return curve


def bits(trainer: Trainer, held_out: dict[str, TokenizedDataset]) -> dict[str, float]:
    shape = replace(trainer.data.shape, packing=True)
    return {
        kind: evaluate_model(trainer.gpt, dataset, shape, trainer.world).bits_per_byte
        for kind, dataset in held_out.items()
    }


def tell(report: Report, job: Job, curves: dict[str, Curve]) -> None:
    """A row for each kind of text, and that both arms have learnt."""
    kinds = [key for key in curves["control"][0] if key != "tokens"]
    for arm, curve in curves.items():
        means = [sum(point[kind] for kind in kinds) / len(kinds) for point in curve]
        report.require(f"{arm} learns: mean bits per byte at its best", min(means) < means[0], min(means), curve)
    if not job.real:
        return
    for kind in kinds:
        shown = "; ".join(
            f"{arm} {curve[0][kind]:.4f}, best {min(p[kind] for p in curve):.4f}, last {curve[-1][kind]:.4f}"
            for arm, curve in curves.items()
        )
        tokens = curves["fused"][-1]["tokens"] / 1e6
        report.measured(f"{kind}, after {tokens:.1f} million tokens", shown, "bits per byte")
