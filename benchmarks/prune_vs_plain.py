"""`fusemega prune search` beside the plain search, which runs the whole model again for each candidate.

    python benchmarks/prune_vs_plain.py [--blocks 5] [--tokens 512] [--windows 4] [--m 8] [--plain-candidates 12]
        [--arms ARM ...]

One process, SmolLM2-135M-Instruct in fp32, text of an encyclopedia. Arms in turn, by processor time: exact,
the same without early stopping, `top_m`, racing; all include opening and reading the model. The plain search's time is
that of a block's and of a head's run, measured on `--plain-candidates` candidates of the first round (0: all of them),
times the number of such runs that it has. The last line is one JSON object with the speed-up of each arm, the share of
each saving, counts of runs, how the orders differ, and peak memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fusemega.config import validate
from fusemega.fixtures import data as assets
from fusemega.prune.calibration import calibration
from fusemega.prune.costs import cross_entropy
from fusemega.prune.order import ResidualBlock
from fusemega.prune.run_file import PruneRun
from fusemega.prune.search import Pruned, search
from fusemega.prune.stage import CalibrationRow, StageBlocks
from fusemega.runtime.parallel import initialize
from fusemega.text.tokenizer import Tokenizer

ARMS = ("exact", "exact_whole_runs", "top_m", "racing")


def run_file(args: argparse.Namespace, out: Path, **keys: Any) -> PruneRun:
    base: dict[str, Any] = {
        "model": {"load": str(args.model or assets.smollm2()), "dtype": "fp32"},
        "data": {
            "path": str(args.text),
            "seq_length": args.tokens // args.windows,
        },
        "blocks": args.blocks,
        "output": str(out),
    }
    return validate(PruneRun, base | keys, "benchmark")


def text_of(args: argparse.Namespace, path: Path) -> Path:
    """A file of one text, of exactly `args.tokens` tokens."""
    lines = assets.domain_data("encyclopedia").train.read_text(encoding="utf-8").splitlines()[: args.tokens // 16]
    text = "\n\n".join(json.loads(line)["text"] for line in lines)
    (encoding,) = Tokenizer.load(args.model or assets.smollm2()).encode([text])
    path.write_text(json.dumps({"text": text[: int(encoding.ends[args.tokens - 1])]}) + "\n", encoding="utf-8")
    return path


@torch.no_grad()
def plain_seconds(run: PruneRun, candidates: int) -> tuple[float, float, float, int]:
    """Processor seconds of opening the model, of one block's run and of one head's over a window; and the windows."""
    begun = time.process_time()
    source = run.open()
    world = initialize(run.parallel)
    with tempfile.TemporaryDirectory() as cache:
        data = calibration(
            *(run.data, run.windows, run.samples, run.seed, source, run.row_shape(source), world, Path(cache))
        )
    stage = StageBlocks(source.build(world), world)
    rows = stage.rows(data.batches)
    cost = cross_entropy(stage.gpt, world, run.ce)
    opening = time.process_time() - begun
    blocks = head = 0.0
    chosen = stage.blocks[:: max(1, len(stage.blocks) // candidates)] if candidates else stage.blocks
    for masked in chosen:
        for row in rows:
            spent = _one(stage, row, masked, cost)
            blocks, head = blocks + spent[0], head + spent[1]
    runs = len(chosen) * len(rows)
    return opening, blocks / runs / (len(stage.blocks) - 1), head / runs, len(rows)


def _one(stage: StageBlocks, row: CalibrationRow, masked: ResidualBlock, cost: Any) -> tuple[float, float]:
    begun = time.process_time()
    hidden = stage.begin(row)
    for block in stage.blocks:
        if block != masked:
            hidden = stage.run(block, hidden, row)
    between = time.process_time()
    cost(stage.final(hidden, row), row, 0)
    return between - begun, time.process_time() - between


def arm(run: PruneRun) -> tuple[float, Pruned]:
    begun = time.process_time()
    result, _ = search(run)
    return time.process_time() - begun, result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--m", type=int, default=8)
    parser.add_argument("--plain-candidates", type=int, default=12)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="the first is compared with")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="prune-vs-plain-") as folder:
        args.text = text_of(args, Path(folder) / "text.jsonl")
        first = run_file(args, Path(folder) / "none")
        opening, block, head, windows = plain_seconds(first, args.plain_candidates)
        arms: dict[str, dict[str, Any]] = {
            "exact": {},
            "exact_whole_runs": {"search": {"name": "exact", "early_stop": False}},
            "top_m": {"search": {"name": "top_m", "m": args.m}},
            "racing": {"search": {"name": "racing"}},
        }
        for number, name in enumerate(args.arms):
            keys = arms[name]
            if number:
                keys["compare"] = str(Path(folder) / "0" / "order.json")
            seconds, result = arm(run_file(args, Path(folder) / str(number), **keys))
            work = result.work
            if not number:
                plain_heads = work.plain_candidates * windows
                found["plain"] = {
                    "seconds": round(opening + work.plain_block_runs * block + plain_heads * head, 1),
                    "opening_seconds": round(opening, 1),
                    "candidates": work.plain_candidates,
                    "block_runs": work.plain_block_runs,
                    "head_runs": plain_heads,
                    "seconds_a_block": block,
                    "seconds_a_head": head,
                    "measured_candidates": args.plain_candidates or work.plain_candidates,
                }
            plain = found["plain"]
            found[name] = {
                "speed_up": round(plain["seconds"] / seconds, 2),
                "seconds": round(seconds, 1),
                "saved_in_blocks": round((plain["block_runs"] - work.block_runs) * block / plain["seconds"], 3),
                "saved_in_heads": round((plain["head_runs"] - work.head_runs) * head / plain["seconds"], 3),
                "order": result.order,
                "perplexity": result.perplexities[-1],
                **work.model_dump(),
                "compared": None if result.compared is None else result.compared.model_dump(),
            }
            print(f"{name}: {found[name]['speed_up']}x", flush=True)
    found["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    found["settings"] = {name: str(value) for name, value in vars(args).items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
