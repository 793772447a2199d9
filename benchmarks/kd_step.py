"""Time of a whole training step that learns from a teacher of another tokenizer: with groups of ids, and without.

    python benchmarks/kd_step.py --teacher FOLDER [--kind code] [--steps 8] [--dtype fp32] [--threads 2]

SmolLM2-135M-Instruct learns from the stored rows of `--teacher` (Qwen2.5-Coder-0.5B-Instruct, for example), through a
map of cells, whose rows have groups, and through one of first pieces, whose rows have none; `labels` is a step without
a teacher. One process a side, the same samples in the same order, in turn: each step gives ratios of times that lie
close together. Figures are medians over the steps behind the first. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from in_turn import Requests, Side

SIDES = ("labels", "first_piece", "cells")
SEQ_LENGTH, BATCH, TOP_K = 1024, 8, 10


def prepare(work: Path, teacher: str, kind: str, samples: int) -> None:
    """The text, the teacher's rows of it, and both maps, by the commands."""
    from fusemega.fixtures.data import chat_data, domain_data, smollm2
    from fusemega.pipeline.run import run
    from fusemega.recipes.steps import Steps

    source = chat_data() if kind == "chat" else domain_data(kind)
    lines = source.train.read_text(encoding="utf-8").splitlines()[:samples]
    (work / "rows.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    steps = Steps(work, 1, {}, {"dtype": "bf16"})
    steps.teach("rows", teacher, {"path": str(work / "rows.jsonl"), "seq_length": SEQ_LENGTH}, top_k=TOP_K)
    for name in SIDES[1:]:
        steps.align(name, teacher, str(smollm2()), "--kind", name)
    run(steps.graph())


def side(requests: Requests, work: Path, name: str, dtype: str, steps: int) -> None:
    """A training run that takes a step at each request."""
    from fusemega.config import validate
    from fusemega.fixtures.data import smollm2
    from fusemega.training.assembly import open_trainer
    from fusemega.training.run_file import TrainRun

    objective: dict[str, Any] = {"name": "sft"}
    if name != "labels":
        teacher = {"store": str(work / "stores" / "rows"), "map": str(work / "maps" / f"{name}.map")}
        objective = {"name": "fuse", "teachers": [teacher], "lambda": 0.5}
    settings = {
        "output_dir": str(work / f"run-{name}"),
        "model": {"load": str(smollm2()), "dtype": dtype},
        "data": {"path": str(work / "rows.jsonl"), "seq_length": SEQ_LENGTH},
        "objective": objective,
        "optimizer": {"lr": 1e-5, "lr_decay_style": "constant"},
        "training": {"train_iters": steps, "global_batch_size": BATCH, "export_hf": False},
    }
    trainer, _ = open_trainer(validate(TrainRun, settings, name))
    requests.serve(lambda _: trainer.step()["lm loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="Hugging Face folder")
    parser.add_argument("--kind", choices=("code", "chat"), default="code")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--side", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        name, folder, dtype, steps = args.side
        side(Requests(), Path(folder), name, dtype, int(steps))
        return
    if args.teacher is None:
        parser.error("--teacher is required")
    with tempfile.TemporaryDirectory() as folder:
        work, script = Path(folder), str(Path(__file__).resolve())
        prepare(work, args.teacher, args.kind, 2 * BATCH)
        words = [str(work), args.dtype, str(args.steps)]
        sides = {name: Side([script, "--side", name, *words], work / f"{name}.log") for name in SIDES}
        taken = []
        try:
            for one in sides.values():
                one.answer()
            for number in range(args.steps):
                order = SIDES[number % 3 :] + SIDES[: number % 3]
                taken.append({name: sides[name].step(number, args.threads) for name in order})
                print("  ".join(f"{name} {taken[-1][name]['seconds']:.2f} s" for name in SIDES), flush=True)
        finally:
            for one in sides.values():
                one.close()
    found: dict[str, Any] = {"benchmark": "kd_step", "kind": args.kind, "dtype": args.dtype, "steps": args.steps}
    for first, second in (("cells", "first_piece"), ("cells", "labels"), ("first_piece", "labels")):
        for unit in ("seconds", "cpu_seconds"):
            ratios = [step[first][unit] / step[second][unit] for step in taken[1:]]
            found[f"{first} / {second}, {unit}"] = [round(f(ratios), 3) for f in (statistics.median, min, max)]
    found["peak_mib"] = {name: round(taken[-1][name]["peak_mib"]) for name in SIDES}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
