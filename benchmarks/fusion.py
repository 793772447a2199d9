"""Two teachers of another vocabulary against one, and against none: held-out bits per byte, several seeds.

    python benchmarks/fusion.py [--tokens 8192] [--finetune 16] [--seeds 3] [--work FOLDER]

The target is SmolLM2-135M-Instruct with a third of its layers cut out, moved onto Mistral v3's vocabulary. The teachers
are two fine-tunes of SmolLM2 made here, on school maths (ASDiv) and on an encyclopedia (BoolQ's passages), `--finetune`
updates each. The target is trained on other texts of both kinds, `--tokens` tokens in all, in four ways from the same
weights: `control` on the labels alone; with `maths` or `encyclopedia` as its only teacher; `fused` with both (MinCE).
TP3 x PP2, one pass over the same tokens each, and as many seeds as asked, which decide the order of the data. What is
finished is skipped the next time. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from fusemega.fixtures.data import domain_data, smollm2
from fusemega.fixtures.tokenizers import tokenizer
from fusemega.recipes.arms import cut, evaluate_here
from fusemega.recipes.stages import Stages

DOMAINS = ("maths", "encyclopedia")
SEQ_LENGTH, HELD_OUT_ROWS = 512, 24
FINETUNE_ROWS = {"maths": 1000, "encyclopedia": 1000}  # the first ones; the target's text comes after them
TP, PP = 3, 2
# Of the ten consecutive layers that could go, the middle ones hurt least (cross-entropy 1.96 -> 4.89 nats on eight
# training conversations; 5.41 without layers 4 to 13, 9.63 without 16 to 25).
CUT_LAYERS = range(12, 22)


def write_data(target: Path, folder: Path, tokens: int) -> dict[str, int]:
    """Files of rows: a teacher's own text, the target's text (half of it of each kind), held-out text."""
    from fusemega.text.tokenizer import Tokenizer

    encode = Tokenizer.load(target).encode
    folder.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    chosen: list[str] = []
    for domain in DOMAINS:
        data, first = domain_data(domain), FINETUNE_ROWS[domain]
        lines = data.train.read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{domain}.jsonl").write_text("".join(lines[:first]), encoding="utf-8")
        held_out = data.held_out.read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"held_out_{domain}.jsonl").write_text("".join(held_out[:HELD_OUT_ROWS]), encoding="utf-8")
        length = 0
        for line in lines[first:]:
            of_row = len(encode([json.loads(line)["text"]])[0].ids) + 2
            if of_row <= SEQ_LENGTH * 3 // 4:  # so that it is one window for SmolLM2's tokenizer as well
                chosen.append(line)
                length += of_row
            if length >= tokens // 2:
                break
        counts[domain] = length
    (folder / "train.jsonl").write_text("".join(chosen), encoding="utf-8")
    return counts


def training(load: str, out: Path, data: Path, objective: dict[str, Any], lr: float, **training: Any) -> dict[str, Any]:
    return {
        "output_dir": str(out),
        "model": {"load": load, "dtype": "fp32"},
        "parallel": {"tensor_model_parallel_size": TP, "pipeline_model_parallel_size": PP},
        "data": {"path": str(data), "seq_length": SEQ_LENGTH},
        "objective": objective,
        "optimizer": {"lr": lr, "lr_warmup_fraction": 0.1, "adam_beta2": 0.95},
        "training": training,
    }


def bits(load: str, held_out: Path) -> float:
    data = {"path": str(held_out), "seq_length": SEQ_LENGTH}
    return float(evaluate_here({"model": {"load": load, "dtype": "fp32"}, "data": data})["bits_per_byte"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192, help="the target's, of each arm")
    parser.add_argument("--finetune", type=int, default=16, help="updates of each teacher")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--lambda", dest="lambda_", type=float, default=0.1, help="weight of the labels")
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="fusemega-fusion-"))
    stages = Stages(work, TP * PP)
    source, vocabulary, target = str(smollm2()), str(tokenizer("mistral_v3")), work / "target"

    stages.run("cut", list(CUT_LAYERS), partial(cut, source, work / "cut", CUT_LAYERS), (work / "cut",))
    move = ("transplant", str(work / "cut"), str(target), "--tokenizer", vocabulary)
    stages.run("transplant", move, lambda: stages.tool(*move), (target,))
    data = work / "data"
    tokens = stages.run("data", args.tokens, partial(write_data, target, data, args.tokens), (data,))
    vocabulary_map = work / "smollm2.map"
    align = ("align", source, vocabulary, str(vocabulary_map))
    stages.run("align", align, lambda: stages.tool(*align), (vocabulary_map,))

    teachers: dict[str, dict[str, str]] = {}
    for domain in DOMAINS:
        out, store = work / f"teacher-{domain}", work / f"store-{domain}"
        run = training(source, out, data / f"{domain}.jsonl", {"name": "sft"}, 1e-4, train_iters=args.finetune)
        run["training"]["global_batch_size"] = 8
        stages.run(f"finetune-{domain}", run, partial(stages.command, "train", f"finetune-{domain}", run), (out,))
        rows = {key: run[key] for key in ("parallel", "data")} | {"store": str(store)}
        rows |= {"model": {"load": str(out / "hf"), "dtype": "fp32"}}
        rows["data"] = {"path": str(data / "train.jsonl"), "seq_length": SEQ_LENGTH}
        stages.run(f"teach-{domain}", rows, partial(stages.command, "teach", f"teach-{domain}", rows), (store,))
        teachers[domain] = {"store": str(store), "map": str(vocabulary_map)}

    shared = {"name": "fuse", "lambda": args.lambda_}
    objectives: dict[str, dict[str, Any]] = {"control": {"name": "sft"}}
    objectives |= {domain: shared | {"teachers": [teachers[domain]]} for domain in DOMAINS}
    objectives["fused"] = shared | {"teachers": list(teachers.values())}

    def score(name: str, load: str) -> dict[str, float]:
        files = {domain: data / f"held_out_{domain}.jsonl" for domain in DOMAINS}
        return stages.run(f"eval-{name}", load, lambda: {domain: bits(load, file) for domain, file in files.items()})

    models = {"target": str(target)} | {f"teacher {d}": str(work / f"teacher-{d}" / "hf") for d in DOMAINS}
    table: dict[str, Any] = {name: score(name.replace(" ", "-"), load) for name, load in models.items()}
    for arm, objective in objectives.items():
        runs = []
        for seed in range(args.seeds):
            name, length = f"{arm}-{seed}", {"train_epochs": 1.0, "global_batch_size": 8, "seed": seed}
            run = training(str(target), work / name, data / "train.jsonl", objective, args.lr, **length)
            stages.run(name, run, partial(stages.command, "train", name, run), (work / name,))
            runs.append(score(name, str(work / name / "hf")))
        table[arm] = {domain: [of_seed[domain] for of_seed in runs] for domain in DOMAINS}
        print(arm, table[arm], flush=True)
    summary = {arm: {domain: spread(table[arm][domain]) for domain in DOMAINS} for arm in objectives}
    means = {arm: statistics.fmean(statistics.fmean(table[arm][d]) for d in DOMAINS) for arm in objectives}
    result = {"benchmark": "fusion", "tokens": tokens, "finetune": args.finetune, "lr": args.lr, "lambda": args.lambda_}
    result |= {"layout": f"TP{TP} x PP{PP}", "bits_per_byte": table, "mean_and_spread": summary, "means": means}
    print(json.dumps(result))


def spread(values: list[float]) -> dict[str, float]:
    """Mean, and the distance between the lowest and the highest."""
    return {"mean": round(statistics.fmean(values), 4), "range": round(max(values) - min(values), 4)}


if __name__ == "__main__":
    main()
