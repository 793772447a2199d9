"""Training steps of every kind of objective: the card's beside the CPU's, from the same weights and samples.

Losses, the gradient of the first step, and what the optimizer made of the weights. Without a GPU the other side is the
CPU on another path: layers computed again in backward, and one sample in each row. A teacher's rows are compared too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusemega.store import Store
from gpu.card import Card
from gpu.elsewhere import on_cpu
from gpu.job import Job
from gpu.models import model_folder, write_chat, write_pairs
from gpu.report import Report
from gpu.trained import gradients, loss_of, opened, run_file, samples, store_rows, weights

STEPS, ROW = 3, 128
# Case -> its objective, and settings of `training`. A path below the part's folder is written {like this}.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sft": ({"name": "sft"}, {}),
    "distill": ({"name": "distill", "store": "{one}", "lambda": 0.3}, {}),
    "fuse": ({"name": "fuse", "teachers": [{"store": "{one}"}, {"store": "{two}"}], "lambda": 0.3}, {}),
    "online_distill": ({"name": "online_distill", "teacher": {"load": "{teacher}", "dtype": "{dtype}"}}, {}),
    "dpo": ({"name": "dpo", "reference": {"in_job": {"load": "{model}", "dtype": "{dtype}"}}}, {}),
    "dpo, shared prompts": (
        {"name": "dpo", "reference": {"in_job": {"load": "{model}", "dtype": "{dtype}"}}},
        {"share_prefix": True},
    ),
    "reward": ({"name": "reward"}, {}),
}
FEW = ("sft", "distill", "dpo, shared prompts")  # of the miniature on a CPU
PAIRS = ("dpo", "dpo, shared prompts", "reward")
OTHER_PATH = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
    "packing": False,
}
# Adam divides by the gradient's own size, which enlarges small differences: `adam_eps` and the bound of "update".
ALLOWED = {
    "fp32": {"loss": 1e-4, "gradient": 1e-4, "update": 1e-2},
    "bf16": {"loss": 3e-2, "gradient": 5e-2},
}


def _filled(value: Any, names: dict[str, str]) -> Any:
    """`value` with its {names} replaced."""
    if isinstance(value, dict):
        return {key: _filled(each, names) for key, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, names) for each in value]
    return value.format(**names) if isinstance(value, str) else value


def steps(folder: Path, out: str, case: str, dtype: str, other_path: bool) -> dict[str, Any]:
    """Losses of `STEPS` steps, the first one's gradient, and how the weights have changed."""
    objective, training = CASES[case]
    paths = {"one": "one", "two": "two", "model": "model", "teacher": "other"}
    names = {"dtype": dtype} | {name: str(folder / path) for name, path in paths.items()}
    settings = {"train_iters": STEPS, "global_batch_size": 4, **training}
    if other_path and "share_prefix" not in training:
        settings |= OTHER_PATH
    run = run_file(
        folder / out,
        folder / "model",
        folder / ("pairs.jsonl" if case in PAIRS else "chat.jsonl"),
        _filled(objective, names),
        dtype=dtype,
        seq_length=2 * ROW if case in PAIRS else ROW,
        training=settings,
        optimizer={"adam_eps": 1e-5},
        transformer_impl="local",
    )
    with opened(run) as trainer:
        before = weights(trainer)
        losses = [loss_of(trainer.step())]
        gradient = gradients(trainer)
        losses += [loss_of(trainer.step()) for _ in range(STEPS - 1)]
        update = {name: after - before[name] for name, after in weights(trainer).items()}
    return {"loss": losses, "gradient": gradient, "update": update}


def reference(work: str, cases: list[str]) -> dict[str, dict[str, Any]]:
    """Everything that the cases need, made on the CPU in `work`, and the cases there in fp32."""
    folder, cpu = Path(work), Card(torch.device("cpu"), "CPU")
    write_chat(folder / "chat.jsonl", rows=16)
    write_pairs(folder / "pairs.jsonl", rows=8, prompt_words=24, response_words=10)
    for name, seed in (("model", 0), ("other", 1)):
        if not (folder / name).exists():
            (folder / name).symlink_to(model_folder(folder, "tiny", cpu, seed))
    for store, model in (("one", "model"), ("two", "other")):
        store_rows(folder / store, folder / model, folder / "chat.jsonl", dtype="fp32", seq_length=ROW, top_k=10)
    return {case: steps(folder, f"reference-{case}", case, "fp32", False) for case in cases}


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Relative distance of the whole; and the tensor that is furthest from its own."""
    each = {name: (ours[name] - theirs[name]).norm() for name in theirs}
    whole = torch.stack(list(each.values())).norm() / torch.stack([t.norm() for t in theirs.values()]).norm()
    return whole.item(), max(each, key=lambda name: (each[name] / theirs[name].norm().clamp(min=1e-30)).item())


def measure(report: Report, job: Job) -> None:
    cases = list(CASES) if job.card.is_gpu or not job.quick else list(FEW)
    folder = job.folder()
    # Prompts that are shared are compared with prompts that are not: loss and gradient are the same.
    plain = list(dict.fromkeys(case.split(",")[0] for case in cases))
    wanted = on_cpu(job, reference, work=str(folder), cases=plain)
    with report.case("teacher's rows"):
        rows(report, folder)
    for case in cases:
        for dtype in ("fp32", "bf16"):
            if dtype == "bf16" and not job.card.is_gpu and case != "sft":
                continue  # slow on a CPU, and the same products
            with report.case(f"{case}, {dtype}"):
                found = steps(folder, f"{case}-{dtype}", case, dtype, other_path=not job.card.is_gpu)
                compare(report, f"{case}, {dtype}", found, wanted[case.split(",")[0]], dtype)


def compare(report: Report, what: str, found: dict[str, Any], wanted: dict[str, Any], dtype: str) -> None:
    allowed = ALLOWED[dtype]
    losses = [abs(a - b) / abs(b) for a, b in zip(found["loss"], wanted["loss"], strict=True)]
    curves = {"found": found["loss"], "wanted": wanted["loss"]}
    report.compare(f"{what}: losses of {STEPS} steps", max(losses), allowed["loss"], "relative", curves)
    for part in ("gradient", "update"):
        if part in allowed:
            whole, worst = distance(found[part], wanted[part])
            report.compare(f"{what}: {part}", whole, allowed[part], "relative", {"worst tensor": worst})


def rows(report: Report, folder: Path) -> None:
    """`teach` on this device, in fp32, beside the CPU's store."""
    made = store_rows(folder / "mine", folder / "model", folder / "chat.jsonl", dtype="fp32", seq_length=ROW, top_k=10)
    mine, theirs = Store.open(made), Store.open(folder / "one")
    different, apart = 0, 0.0
    for key in samples(folder / "model", folder / "chat.jsonl", ROW).keys:
        ours, row = mine.get(key), theirs.get(key)
        assert ours is not None and row is not None
        different += int((np.sort(ours.ids_PK) != np.sort(row.ids_PK)).any(1).sum())
        apart = max(apart, abs(ours.sum_logp - row.sum_logp) / len(row.ids_PK))
    report.compare("teacher's rows: positions with another set of ids", different, 0)
    report.compare("teacher's rows: log-probability of the text", apart, 1e-4, "nats a token")
