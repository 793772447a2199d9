"""Bits per byte of held-out text against removed blocks, for every measure and for each type of block.

    python benchmarks/prune_curve.py OUT [--blocks 8] [--rows 8] [--held-out 8] [--search top_m]

One process, SmolLM2-135M-Instruct in fp32. Each order is searched on an encyclopedia's training text and measured on
its held-out text. OUT gets the orders, bits-per-byte.png and by-parameters.png, since an MLP has more parameters than
attention. The last line is one JSON object: for each arm the order, the bits per byte after 0, 1, 2, ... removals, and
the share of the model's parameters that is left then. Orders that are in OUT already are not searched again.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from fusemega.config import validate
from fusemega.fixtures import data as assets
from fusemega.hf.folder import HFFolder
from fusemega.models.architecture import Architecture
from fusemega.prune.evaluate import evaluate_order
from fusemega.prune.order import ResidualBlock
from fusemega.prune.run_file import PruneEvalRun, PruneRun
from fusemega.prune.savings import size_of, size_of_blocks
from fusemega.prune.search import search
from fusemega.report.charts import Chart, Curve, png, short

ARMS: dict[str, dict[str, Any]] = {
    "perplexity, mix": {},
    "perplexity, mha": {"type": "mha"},
    "perplexity, mlp": {"type": "mlp"},
    "perplexity, plain": {"constraint": "plain"},
    "JS divergence": {"measure": "js_divergence"},
    "block influence": {"measure": "block_influence"},
    "relative magnitude": {"measure": "relative_magnitude"},
    "angular distance": {"measure": "angular_distance"},
    "random": {"measure": "random"},
}
SEARCHED = ("perplexity", "JS")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--blocks", type=int, default=8, help="even, for measures of whole layers")
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=8, help="rows of held-out text")
    parser.add_argument("--search", default="top_m", choices=("exact", "top_m", "racing"))
    parser.add_argument("--m", type=int, default=8)
    args = parser.parse_args()
    files = assets.domain_data("encyclopedia")
    model = {"load": str(args.model or assets.smollm2()), "dtype": "fp32"}
    settings = {"name": args.search} | ({"m": args.m} if args.search == "top_m" else {})
    found: dict[str, Any] = {}
    for name, keys in ARMS.items():
        folder = args.out / name.replace(" ", "-").replace(",", "")
        if not folder.exists():
            base: dict[str, Any] = {
                "model": model,
                "data": {"path": str(files.train), "seq_length": args.seq_length, "limit": args.rows},
                "blocks": args.blocks,
                "output": str(folder),
                **({"search": settings} if name.startswith(SEARCHED) else {}),
            }
            search(validate(PruneRun, base | keys, name))
        measured: dict[str, Any] = {
            "model": model,
            "data": {"path": str(files.held_out), "seq_length": args.seq_length, "limit": args.held_out},
            "order": str(folder / "order.json"),
        }
        result, _ = evaluate_order(validate(PruneEvalRun, measured, name))
        found[name] = {"order": json.loads((folder / "order.json").read_text())["steps"], "loss": result.loss}
        found[name]["tokens"] = result.tokens
        print(f"{name}: {list(result.perplexities.values())}", flush=True)
    per_byte = tokens_per_byte(Path(model["load"]), files.held_out, args.held_out)
    for each in found.values():
        each["bits_per_byte"] = [loss / math.log(2) * per_byte for loss in each.pop("loss").values()]
    architecture = HFFolder(model["load"]).architecture
    for each in found.values():
        each["parameters_left"] = parameters_left(architecture, each["order"])
    removed = [[float(n) for n in range(len(each["bits_per_byte"]))] for each in found.values()]
    percent = [[100 * (1 - left) for left in each["parameters_left"]] for each in found.values()]
    named = list(enumerate(found.items()))
    # Random removal soon ruins the model; on its scale the others would be one line.
    highest = 1.02 * max(max(each["bits_per_byte"]) for name, each in found.items() if name != "random")
    for file, label, values in (
        ("bits-per-byte", "removed blocks", removed),
        ("by-parameters", "% of the parameters removed", percent),
    ):
        curves = [Curve(name, i, list(zip(values[i], each["bits_per_byte"], strict=True))) for i, (name, each) in named]
        chart = Chart(file, "Bits per byte of held-out text", "", label, curves, short, highest=highest)
        (args.out / f"{file}.png").write_bytes(png(chart))
    print(json.dumps(found))


def parameters_left(architecture: Architecture, steps: list[dict[str, Any]]) -> list[float]:
    """The share of the model's parameters after 0, 1, 2, ... removals."""
    whole, gone, left = size_of(architecture).parameters, 0, [1.0]
    for step in steps:
        kind, layer = step["block"]
        gone += size_of_blocks(architecture, [ResidualBlock(kind, layer)]).parameters
        left.append(1 - gone / whole)
    return left


def tokens_per_byte(model: Path, texts: Path, rows: int) -> float:
    """Of the joined text, as it is tokenized for the windows."""
    from fusemega.text.tokenizer import Tokenizer

    lines = texts.read_text(encoding="utf-8").splitlines()[:rows]
    text = "\n\n".join(json.loads(line)["text"] for line in lines)
    (encoding,) = Tokenizer.load(model).encode([text])
    return len(encoding.ids) / len(text.encode())


if __name__ == "__main__":
    main()
