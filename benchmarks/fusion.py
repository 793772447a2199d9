"""Two teachers of another vocabulary against one, and against none, on the text of both and on other kinds.

    python benchmarks/fusion.py [--tokens 4096] [--passes 6] [--finetune 12] [--seeds 3] [--work FOLDER]

The target is SmolLM2-135M-Instruct with a third of its layers cut out, moved onto Mistral v3's vocabulary. The teachers
are two fine-tunes of SmolLM2 made here, on school maths (ASDiv) and on an encyclopedia (BoolQ's passages), `--finetune`
updates each. The target is trained on other texts of both kinds, `--tokens` tokens in all, `--passes` times, in four
ways from the same weights: `control` on the labels alone; with `maths` or `encyclopedia` as its only teacher; `fused`
with both (MinCE). Measured on held-out text: bits per byte of both kinds, and of two kinds that no model was trained on
here, and of both kinds the distance to that kind's teacher, KL over cells in nats. Seeds decide the order of the data.
What is finished is skipped the next time. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from seeds import spread

from fusemega.fixtures.data import chat_data, domain_data, smollm2
from fusemega.fixtures.tokenizers import tokenizer
from fusemega.pipeline.functions import stage_function
from fusemega.pipeline.run import run
from fusemega.recipes.measures import evaluate_here
from fusemega.recipes.prepare import cut
from fusemega.recipes.steps import Steps

DOMAINS, OTHERS = ("maths", "encyclopedia"), ("code", "chat")
SEQ_LENGTH, HELD_OUT_ROWS = 512, {"maths": 24, "encyclopedia": 24, "code": 10, "chat": 10}
FINETUNE_ROWS = {"maths": 1000, "encyclopedia": 1000}  # the first ones; the target's text comes after them
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
    for kind, rows in HELD_OUT_ROWS.items():
        data = chat_data() if kind == "chat" else domain_data(kind)
        held_out = data.held_out.read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"held_out_{kind}.jsonl").write_text("".join(held_out[:rows]), encoding="utf-8")
    for domain in DOMAINS:
        data, first = domain_data(domain), FINETUNE_ROWS[domain]
        lines = data.train.read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{domain}.jsonl").write_text("".join(lines[:first]), encoding="utf-8")
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
def measure(load: str, held_out: dict[str, str], teachers: dict[str, Any]) -> dict[str, float]:
    """Bits per byte on held-out text of each kind, and `kl KIND`, the distance to the kind's teacher where it has one.

    Args:
        teachers: a kind's `teacher` section of `fusemega eval`; empty for a model that is none of the target's.
    """
    found = {}
    for kind, path in held_out.items():
        settings: dict[str, Any] = {"model": {"load": load, "dtype": "fp32"}}
        settings["data"] = {"path": path, "seq_length": SEQ_LENGTH}
        if kind in teachers:
            settings["teacher"] = teachers[kind]
        result = evaluate_here(settings)
        found[kind] = float(result["bits_per_byte"])
        if kind in teachers:
            found[f"kl {kind}"] = float(result["kl"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096, help="the target's, of each arm and pass")
    parser.add_argument("--passes", type=float, default=6.0)
    parser.add_argument("--finetune", type=int, default=12, help="updates of each teacher")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--lambda", dest="lambda_", type=float, default=0.5, help="weight of the labels")
    parser.add_argument("--batch", type=int, default=4, help="samples of an update")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="of training and of the teachers' rows"
    )
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="fusemega-fusion-"))
    parallel = {"tensor_model_parallel_size": args.tp, "pipeline_model_parallel_size": args.pp}
    steps = Steps(work, args.tp * args.pp, parallel, {"dtype": args.dtype})
    source, vocabulary, data = str(smollm2()), str(tokenizer("mistral_v3")), work / "data"

    settings = {"model": source, "out": str(work / "cut"), "drop": list(CUT_LAYERS)}
    steps.call("cut", cut, settings, {"model": source}, outputs={"model": str(work / "cut")})
    target = steps.transplant(str(work / "cut"), str(work / "target"), vocabulary)
    settings = {"target": target, "out": str(data), "tokens": args.tokens}
    steps.call("data", write_data, settings, {"target": target}, outputs={"rows": str(data)})
    vocabulary_map = steps.align("smollm2", source, vocabulary)
    held_out = {kind: str(data / f"held_out_{kind}.jsonl") for kind in (*DOMAINS, *OTHERS)}
    text = {"path": str(data / "train.jsonl"), "seq_length": SEQ_LENGTH}
    adam = {"lr_warmup_fraction": 0.1, "adam_beta2": 0.95}

    models, teachers, measured = {"target": target}, {}, {}
    for domain in DOMAINS:
        rows = {"path": str(data / f"{domain}.jsonl"), "seq_length": SEQ_LENGTH}
        length = {"train_iters": args.finetune, "global_batch_size": 8}
        tuned = steps.train(f"teacher-{domain}", source, rows, {"name": "sft"}, {"lr": 1e-4, **adam}, length)
        teachers[domain] = {"store": steps.teach(domain, tuned, text), "map": vocabulary_map}
        rows = {"path": held_out[domain], "seq_length": SEQ_LENGTH}
        measured[domain] = {"store": steps.teach(f"measured-{domain}", tuned, rows), "map": vocabulary_map}
        models[f"teacher {domain}"] = tuned

    shared = {"name": "fuse", "lambda": args.lambda_}
    objectives: dict[str, dict[str, Any]] = {"control": {"name": "sft"}}
    objectives |= {domain: shared | {"teachers": [teachers[domain]]} for domain in DOMAINS}
    objectives["fused"] = shared | {"teachers": list(teachers.values())}
    for arm, objective in objectives.items():
        for seed in range(args.seeds):
            length = {"train_epochs": args.passes, "global_batch_size": args.batch, "seed": seed}
            length |= {"save_interval": 1000, "keep_checkpoints": 1}
            models[f"{arm}-{seed}"] = steps.train(
                f"{arm}-{seed}", target, text, objective, {"lr": args.lr, **adam}, length
            )
    for name, load in models.items():
        own = {} if name.startswith("teacher") else measured
        files = {**held_out, **{f"{kind} {key}": path for kind, of in own.items() for key, path in of.items()}}
        asked = {"load": load, "held_out": held_out, "teachers": own}
        steps.call(f"eval-{name.replace(' ', '-')}", measure, asked, {"model": load}, files)
    results = run(steps.graph()).results
    table: dict[str, Any] = {name: results[f"eval-{name.replace(' ', '-')}"] for name in list(models)[:3]}
    for arm in objectives:
        of_seeds = [results[f"eval-{arm}-{seed}"] for seed in range(args.seeds)]
        table[arm] = {key: spread([of_seed[key] for of_seed in of_seeds]) for key in of_seeds[0]}
    for name, row in table.items():
        print(name, json.dumps(row), flush=True)
    names = ("tokens", "passes", "finetune", "seeds", "lr", "lambda_", "batch", "dtype")
    result = {"benchmark": "fusion", **{name.rstrip("_"): getattr(args, name) for name in names}}
    print(json.dumps(result | {"trained": results["data"], "layout": f"TP{args.tp} x PP{args.pp}", "measures": table}))


if __name__ == "__main__":
    main()
