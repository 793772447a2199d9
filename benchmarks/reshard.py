"""Saved in one layout, resumed in another: the loss curve goes on as that of one process.

    python benchmarks/reshard.py [--steps 10] [--switch 5] [--most 8]

Trains a tiny random Llama (tied embeddings, an odd vocabulary that tensor parallelism pads) on real chat text in fp32,
through the code of `fusemega train`: `--switch` steps in the first layout of each pair, a checkpoint, the rest in the
second. Every pair is compared with one process that is never interrupted. Layouts of as many processes share a launch.
The last line is one JSON object; `ok` says whether every loss after the switch is within 1e-5 of that of one process.
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

TOLERANCE = 1e-5

TP2 = {"tensor_model_parallel_size": 2}
SP = {"sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
PP4 = {"pipeline_model_parallel_size": 4}
CP2 = {"context_parallel_size": 2}
VPP2 = {"virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": True}
FIRST1 = {"num_layers_in_first_pipeline_stage": 1}
# name -> (processes, parallel section)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "TP2": (2, TP2),
    "TP2+SP": (2, TP2 | SP),
    "DP2": (2, {}),
    "CP2": (2, CP2),
    "PP2xVPP2": (2, PP2 | VPP2),
    "PP2, 1 + 3 layers": (2, PP2 | FIRST1),
    "TP2+SPxCP2": (4, TP2 | SP | CP2),
    "CP2xPP2xVPP2": (4, CP2 | PP2 | VPP2),
    "CP2xDP2": (4, CP2),
    "TP2xDP2": (4, TP2),
    "PP4": (4, PP4),
    "DP4": (4, {}),
    "TP2xPP2xDP2+SP": (8, TP2 | SP | PP2),
}
PAIRS = (
    ("1", "TP2+SP"),
    ("TP2", "PP2xVPP2"),
    ("PP2xVPP2", "CP2"),
    ("CP2", "1"),
    ("PP2, 1 + 3 layers", "DP2"),
    ("TP2+SPxCP2", "DP4"),
    ("DP4", "CP2xPP2xVPP2"),
    ("CP2xPP2xVPP2", "TP2xDP2"),
    ("PP4", "CP2xDP2"),
    ("TP2xPP2xDP2+SP", "1"),
)


def train_part(work: Path, name: str, layout: str, until: int, steps: int) -> list[dict[str, float]]:
    """In a rank: goes on in `layout` until so many steps are done, saves, and returns the rows of these steps."""
    from fusemega.config import validate
    from fusemega.training.assembly import open_trainer
    from fusemega.training.run_file import TrainRun

    section = {
        "output_dir": str(work / "runs" / name),
        "model": {"load": str(work / "model"), "dtype": "fp32"},
        "parallel": LAYOUTS[layout][1],
        "data": {"path": str(work / "chat.jsonl"), "seq_length": 128},
        "objective": {"name": "sft"},
        "optimizer": {"lr": 2e-3, "weight_decay": 0.1, "clip_grad": 1.0, "lr_warmup_fraction": 0.1},
        "training": {"train_iters": steps, "global_batch_size": 16, "export_hf": False},
    }
    trainer, _ = open_trainer(validate(TrainRun, section, name))
    rows = []
    while trainer.iteration < until:
        row = trainer.step()
        rows.append({"iteration": trainer.iteration, "loss": row["lm loss"], "grad-norm": row["grad-norm"]})
    trainer.save()
    return rows


def launch(work: Path, world: int, jobs: list[tuple[str, str, int]], steps: int) -> dict[str, list[dict[str, float]]]:
    """Rows of each job (name, layout, until), all of `world` processes."""
    (work / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command += [__file__, "--rank-of", str(work), "--steps", str(steps)]
    subprocess.run(command, check=True, env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore"))
    return json.loads((work / "rows.json").read_text())


def difference(rows: list[dict[str, float]], reference: list[dict[str, float]], key: str) -> float:
    """Largest relative difference over the steps of `rows`."""
    whole = {row["iteration"]: row[key] for row in reference}
    return max(abs(row[key] - whole[row["iteration"]]) / abs(whole[row["iteration"]]) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--switch", type=int, default=5)
    parser.add_argument("--most", type=int, default=8, help="leave out layouts of more processes")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        work = args.rank_of
        jobs = json.loads((work / "jobs.json").read_text())
        mine = {name: train_part(work, name, layout, until, args.steps) for name, layout, until in jobs}
        if os.environ.get("RANK", "0") == "0":
            (work / "rows.json").write_text(json.dumps(mine))
        return

    import tiny

    pairs = [pair for pair in PAIRS if max(LAYOUTS[name][0] for name in pair) <= args.most]
    with tempfile.TemporaryDirectory(prefix="fusemega-reshard-") as folder:
        work = Path(folder)
        tiny.write_model(work / "model", tiny.write_chat(work / "chat.jsonl", rows=96, characters=300))
        found: dict[str, list[dict[str, float]]] = {}
        for half, until in ((0, args.switch), (1, args.steps)):
            for world in sorted({LAYOUTS[pair[half]][0] for pair in pairs}):
                jobs = [(" -> ".join(p), p[half], until) for p in pairs if LAYOUTS[p[half]][0] == world]
                if world == 1 and half == 0:
                    jobs.append(("uninterrupted", "1", args.steps))
                parts = launch(work, world, jobs, args.steps)
                found |= {name if name == "uninterrupted" else f"{name} {half}": part for name, part in parts.items()}
    report = {}
    for pair in pairs:
        name = " -> ".join(pair)
        rows = found[f"{name} 1"]
        assert [row["iteration"] for row in rows] == list(range(args.switch + 1, args.steps + 1)), "did not resume"
        report[name] = {
            "loss_before": difference(found[f"{name} 0"], found["uninterrupted"], "loss"),
            "loss_after": difference(rows, found["uninterrupted"], "loss"),
            "grad_norm_after": difference(rows, found["uninterrupted"], "grad-norm"),
        }
        print(f"{name:<30} " + "  ".join(f"{key} {value:.1e}" for key, value in report[name].items()))
    worst = max(pair["loss_after"] for pair in report.values())
    ok = worst <= TOLERANCE and len(report) >= 8
    result = {"benchmark": "reshard", "steps": args.steps, "switch": args.switch, "pairs": report, "worst_loss": worst}
    print(json.dumps(result | {"ok": ok}))
    sys.exit(not ok)


if __name__ == "__main__":
    main()
