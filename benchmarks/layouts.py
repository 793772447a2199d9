"""The same loss curve in every layout: 20 steps of each, relative to one process.

    python benchmarks/layouts.py [--steps 20] [--quick]

Trains a tiny random Llama (tied embeddings, an odd vocabulary that needs padding) on real chat text in fp32, through
the same code as `fusemega train`: every layout, micro-batch sizes 1, 2 and 4, packed rows and one sample a row.
Several layouts share a launch. The last line is one JSON object; `ok` says whether every case is within
1e-5 (loss, all steps), 1e-5 (gradient norm, step 1) and 1e-4 (gradient norm, all steps) of the reference.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LOSS_TOLERANCE, FIRST_NORM_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-5, 1e-4

TP2 = {"tensor_model_parallel_size": 2}
SP = {"sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
# name -> (processes, parallel section, training section)
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "reference": (1, {}, {}),
    "micro-batch 2": (1, {}, {"micro_batch_size": 2}),
    "micro-batch 4": (1, {}, {"micro_batch_size": 4}),
    "unpacked": (1, {}, {"packing": False}),
    "TP2": (2, TP2, {}),
    "TP2+SP": (2, TP2 | SP, {}),
    "TP2+SP unpacked, micro-batch 4": (2, TP2 | SP, {"packing": False, "micro_batch_size": 4}),
    "PP2": (2, PP2, {}),
    "PP2 unpacked, micro-batch 2": (2, PP2, {"packing": False, "micro_batch_size": 2}),
    "DP2, distributed optimizer": (2, {}, {}),
    "DP2, micro-batch 2": (2, {}, {"micro_batch_size": 2}),
    "TP2xPP2xDP2": (8, TP2 | PP2, {}),
    "TP2xPP2xDP2+SP, micro-batch 2": (8, TP2 | SP | PP2, {"micro_batch_size": 2}),
    "TP2xPP2xDP2+SP unpacked, micro-batch 4": (8, TP2 | SP | PP2, {"packing": False, "micro_batch_size": 4}),
}
QUICK = ("reference", "unpacked", "TP2+SP", "PP2", "DP2, micro-batch 2", "TP2xPP2xDP2")


def curves(work: Path, steps: int, names: list[str]) -> dict[str, list[tuple[float, float]]]:
    """In a rank: (loss, gradient norm) of each step, for each case."""
    from fusemega.config import validate
    from fusemega.training.run import TrainRun
    from fusemega.training.train import open_trainer

    found = {}
    for name in names:
        _, parallel, training = CASES[name]
        run = validate(
            TrainRun,
            {
                "output_dir": str(work / "runs" / name),
                "model": {"load": str(work / "model"), "dtype": "fp32"},
                "parallel": parallel,
                "data": {"path": str(work / "chat.jsonl"), "seq_length": 128},
                "objective": {"name": "sft"},
                "optimizer": {"lr": 2e-3, "weight_decay": 0.1, "clip_grad": 1.0, "lr_warmup_fraction": 0.1},
                "training": {"train_iters": steps, "global_batch_size": 16, "export_hf": False, **training},
            },
            name,
        )
        trainer, _ = open_trainer(run)
        rows = [trainer.step() for _ in range(steps)]
        found[name] = [(row["lm loss"], row["grad-norm"]) for row in rows]
    return found


def relative(a: float, b: float) -> float:
    return abs(a - b) / abs(b)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="six cases only")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cases", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        mine = curves(args.rank_of, args.steps, args.cases)
        if os.environ.get("RANK", "0") == "0":
            (args.rank_of / f"curves-{os.environ.get('WORLD_SIZE', '1')}.json").write_text(json.dumps(mine))
        return

    import tiny

    names = [name for name in CASES if not args.quick or name in QUICK]
    with tempfile.TemporaryDirectory(prefix="fusemega-layouts-") as folder:
        work = Path(folder)
        tiny.write_model(work / "model", tiny.write_chat(work / "chat.jsonl", rows=96, characters=300))
        found: dict[str, list[tuple[float, float]]] = {}
        for world in sorted({CASES[name][0] for name in names}):
            cases = [name for name in names if CASES[name][0] == world]
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
            command = [sys.executable, *launch, __file__, "--rank-of", folder, "--steps", str(args.steps), "--cases"]
            environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
            subprocess.run([*command, *cases], check=True, env=environment)
            found |= json.loads((work / f"curves-{world}.json").read_text())

    reference = found["reference"]
    report = {}
    for name in names:
        report[name] = {
            "loss": max(relative(a[0], b[0]) for a, b in zip(found[name], reference, strict=True)),
            "grad_norm_step_1": relative(found[name][0][1], reference[0][1]),
            "grad_norm": max(relative(a[1], b[1]) for a, b in zip(found[name], reference, strict=True)),
        }
        print(f"{name:<40} " + "  ".join(f"{key} {value:.1e}" for key, value in report[name].items()))
    ok = all(
        case["loss"] <= LOSS_TOLERANCE
        and case["grad_norm_step_1"] <= FIRST_NORM_TOLERANCE
        and case["grad_norm"] <= NORM_TOLERANCE
        for case in report.values()
    )
    curve = {"first_loss": reference[0][0], "last_loss": reference[-1][0]}
    print(json.dumps({"benchmark": "layouts", "ok": ok, "steps": args.steps, **curve, "relative_difference": report}))
    sys.exit(not ok)


if __name__ == "__main__":
    main()
