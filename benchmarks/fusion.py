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
from pathlib import Path
from typing import Any

from fusemega.fixtures.data import domain_data, smollm2
from fusemega.fixtures.tokenizers import tokenizer
from fusemega.pipeline.functions import stage_function
from fusemega.pipeline.run import run
from fusemega.recipes.measures import evaluate_here
from fusemega.recipes.prepare import cut
from fusemega.recipes.steps import Steps

DOMAINS = ("maths", "encyclopedia")
SEQ_LENGTH, HELD_OUT_ROWS = 512, 24
FINETUNE_ROWS = {"maths": 1000, "encyclopedia": 1000}  # the first ones; the target's text comes after them
TP, PP = 3, 2
# Of the ten consecutive layers that could go, the middle ones hurt least (cross-entropy 1.96 -> 4.89 nats on eight
# training conversations; 5.41 without layers 4 to 13, 9.63 without 16 to 25).
CUT_LAYERS = range(12, 22)


@stage_function
def write_data(target: str, out: str, tokens: int) -> dict[str, int]:
    """Files of rows: a teacher's own text, the target's text (half of it of each kind), held-out text."""
    from fusemega.text.tokenizer import Tokenizer

    folder = Path(out)
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


@stage_function
def bits(load: str, held_out: dict[str, str]) -> dict[str, float]:
    """Bits per byte on the held-out text of each kind."""
    found = {}
    for domain, path in held_out.items():
        data = {"path": path, "seq_length": SEQ_LENGTH}
        found[domain] = float(evaluate_here({"model": {"load": load, "dtype": "fp32"}, "data": data})["bits_per_byte"])
    return found


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
    parallel = {"tensor_model_parallel_size": TP, "pipeline_model_parallel_size": PP}
    steps = Steps(work, TP * PP, parallel, {"dtype": "fp32"})
    source, vocabulary, data = str(smollm2()), str(tokenizer("mistral_v3")), work / "data"

    settings = {"model": source, "out": str(work / "cut"), "drop": list(CUT_LAYERS)}
    steps.call("cut", cut, settings, {"model": source}, outputs={"model": str(work / "cut")})
    target = steps.transplant(str(work / "cut"), str(work / "target"), vocabulary)
    settings = {"target": target, "out": str(data), "tokens": args.tokens}
    steps.call("data", write_data, settings, {"target": target}, outputs={"rows": str(data)})
    vocabulary_map = steps.align("smollm2", source, vocabulary)
    held_out = {domain: str(data / f"held_out_{domain}.jsonl") for domain in DOMAINS}
    text = {"path": str(data / "train.jsonl"), "seq_length": SEQ_LENGTH}
    adam = {"lr_warmup_fraction": 0.1, "adam_beta2": 0.95}

    models, teachers = {"target": target}, {}
    for domain in DOMAINS:
        rows = {"path": str(data / f"{domain}.jsonl"), "seq_length": SEQ_LENGTH}
        length = {"train_iters": args.finetune, "global_batch_size": 8}
        tuned = steps.train(f"teacher-{domain}", source, rows, {"name": "sft"}, {"lr": 1e-4, **adam}, length)
        teachers[domain] = {"store": steps.teach(domain, tuned, text), "map": vocabulary_map}
        models[f"teacher {domain}"] = tuned

    shared = {"name": "fuse", "lambda": args.lambda_}
    objectives: dict[str, dict[str, Any]] = {"control": {"name": "sft"}}
    objectives |= {domain: shared | {"teachers": [teachers[domain]]} for domain in DOMAINS}
    objectives["fused"] = shared | {"teachers": list(teachers.values())}
    for arm, objective in objectives.items():
        for seed in range(args.seeds):
            length = {"train_epochs": 1.0, "global_batch_size": 8, "seed": seed}
            models[f"{arm}-{seed}"] = steps.train(
                f"{arm}-{seed}", target, text, objective, {"lr": args.lr, **adam}, length
            )
    for name, load in models.items():
        asked = {"load": load, "held_out": held_out}
        steps.call(f"eval-{name.replace(' ', '-')}", bits, asked, {"model": load}, held_out)
    results = run(steps.graph()).results
    table: dict[str, Any] = {name: results[f"eval-{name.replace(' ', '-')}"] for name in list(models)[:3]}
    tokens = results["data"]
    for arm in objectives:
        of_seeds = [results[f"eval-{arm}-{seed}"] for seed in range(args.seeds)]
        table[arm] = {domain: [of_seed[domain] for of_seed in of_seeds] for domain in DOMAINS}
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
