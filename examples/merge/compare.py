"""Three fine-tunes of SmolLM2-135M on three kinds of real text, merged by every method: bits per byte of each on each.

    python examples/merge/compare.py [--output runs/merge] [--steps 24] [--tokens 1024] [--held-out 24] [--nproc 1]

Fetches SmolLM2-135M-Instruct, HumanEval, ASDiv and BoolQ's passages (`fusemega.fixtures`), trains one copy of the model
on each with `fusemega train`, merges the three with `fusemega merge`, and scores base, parts and merges on held-out
rows. Everything stays in the output folder, run files included; what is finished is skipped the next time. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fusemega.fixtures.data import DOMAINS, domain_data, smollm2
from fusemega.pipeline.functions import stage_function
from fusemega.pipeline.run import run
from fusemega.pipeline.stage import Stage
from fusemega.recipes.measures import evaluate_here
from fusemega.recipes.steps import Steps

WEIGHTS = {"weight": 1 / 3}
MERGES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear", WEIGHTS),
    "task_arithmetic": ("task_arithmetic", {"weight": 0.5}),
    "ties": ("ties", WEIGHTS | {"density": 0.6}),
    "dare_linear": ("dare_linear", WEIGHTS | {"density": 0.6}),
    "dare_ties": ("dare_ties", WEIGHTS | {"density": 0.6, "normalize": True}),
    "della": ("della", WEIGHTS | {"density": 0.6}),
    "varm": ("varm", {}),
    "sce": ("sce", {"select_topk": 0.1}),
    "sce_paper": ("sce_paper", {"select_topk": 0.1}),
    "sce_mergekit": ("sce_mergekit", {"select_topk": 0.1}),
    "slerp (code, maths)": ("slerp", {"t": 0.5}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/merge"))
    parser.add_argument("--steps", type=int, default=24, help="updates of each fine-tune")
    parser.add_argument("--tokens", type=int, default=1024, help="about so many an update")
    parser.add_argument("--held-out", type=int, default=24, help="rows a domain to score")
    parser.add_argument("--nproc", type=int, default=1)
    args = parser.parse_args()
    output: Path = args.output
    base = smollm2()
    steps = Steps(output, args.nproc, {}, {"dtype": "fp32"})
    parts: dict[str, str] = {}
    held_out: dict[str, str] = {}
    output.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        data = domain_data(domain)
        lines = data.held_out.read_text(encoding="utf-8").splitlines(keepends=True)
        held_out[domain] = str(output / f"held_out_{domain}.jsonl")
        Path(held_out[domain]).write_text("".join(lines[: args.held_out]), encoding="utf-8")
        rows, training = {"path": str(data.train), "seq_length": 512}, {"train_iters": args.steps}
        training["global_batch_size"] = max(1, args.tokens // 128)
        optimizer = {"lr": 1e-4, "lr_warmup_fraction": 0.1}
        parts[domain] = steps.train(domain, str(base), rows, {"name": "sft"}, optimizer, training)
    folders = {"base": str(base), **parts}
    for name, (method, settings) in MERGES.items():
        steps.stages.append(merging(method, settings, str(base), parts, output / f"merged_{method}"))
        folders[name] = str(output / f"merged_{method}")
    for number, folder in enumerate(folders.values()):
        asked = {"folder": folder, "held_out": held_out}
        steps.call(f"scores-{number}", scores, asked, {"model": folder}, held_out)
    results = run(steps.graph()).results
    table = {name: results[f"scores-{number}"] for number, name in enumerate(folders)}
    print(f"{'bits per byte':24s}" + "".join(f"{domain:>14s}" for domain in DOMAINS) + f"{'mean':>14s}")
    for name, row in table.items():
        values = [row[domain] for domain in DOMAINS]
        print(f"{name:24s}" + "".join(f"{value:14.4f}" for value in [*values, sum(values) / len(values)]))
    print(json.dumps({"example": "merge", "steps": args.steps, "tokens": args.tokens, "bits_per_byte": table}))


def merging(method: str, settings: dict[str, Any], base: str, parts: dict[str, str], out: Path) -> Stage:
    """`fusemega merge` as anyone may type it."""
    chosen = list(parts.values())[:2] if method == "slerp" else list(parts.values())
    first, models = (chosen[0], chosen[1:]) if method == "slerp" else (base, chosen)
    words = ["merge", str(out), "--method", method, "--base", first]
    words += ["--models", *models, *(f"parameters.{key}={value}" for key, value in settings.items()), "--resume"]
    inputs = {"base": first} | {f"models.{number}": model for number, model in enumerate(models)}
    return Stage(method, tuple(words), inputs=inputs, outputs={"model": str(out)}, resumes=True)


@stage_function
def scores(folder: str, held_out: dict[str, str]) -> dict[str, float]:
    """Bits per byte of a model on every domain."""
    found = {}
    for domain, path in held_out.items():
        data = {"path": path, "seq_length": 512}
        evaluation = {"model": {"load": folder, "dtype": "fp32"}, "data": data}
        found[domain] = float(evaluate_here(evaluation)["bits_per_byte"])
    return found


if __name__ == "__main__":
    main()
