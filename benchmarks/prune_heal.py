"""Whole layers against single blocks at equal parameters, each healed by labels alone and by its unpruned self.

    python benchmarks/prune_heal.py --order order.json [--blocks 8] [--drop 5 14 17 18] [--seeds 3] [--tiny]

Two targets are made of SmolLM2-135M-Instruct (or `--model`): `layers` lacks the whole layers `--drop`; `blocks` lacks
the first `--blocks` blocks of `--order`, a file of `fusemega prune search`. Each is measured as it is (`pruned`), and
after training copies of it on the same `--tokens` tokens of chat, `--passes` times, for `--seeds` orders of the data:

    labels   `sft`
    stored   `distill` from the whole model's ten most probable tokens, stored once
    online   `online_distill`: the whole model runs beside, and its whole distribution is matched (forward KL)

Measured on held-out chat and on code, maths and an encyclopedia, which no arm was trained on: bits per byte, KL from
the whole model in nats a token, and how often both find the same token most probable; each is the mean over seeds with
its range. `curves`: bits per byte on held-out chat against the tokens trained on, of the first seed. `equal` says by
how much the parameters of the two targets differ. `--tiny` takes a random model of three layers and one update: it
shows that everything runs. What is finished is skipped the next time. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import tiny
from seeds import spread

from fusemega.fixtures.data import DOMAINS, chat_data, domain_data, smollm2
from fusemega.hf.folder import HFFolder
from fusemega.pipeline.run import run
from fusemega.prune.order import Order, ResidualBlock, Step, read_order
from fusemega.recipes.measures import measure
from fusemega.recipes.prepare import choose_rows, cut
from fusemega.recipes.prune_steps import PruneSteps
from fusemega.training.records import read_evaluations, read_metrics

SEQ_LENGTH, TOP_K, MEASURED = 512, 10, 1536
SHOWN = ("bits_per_byte", "kl", "same_top_1")


def main() -> None:
    """Runs all stages and prints what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face folder; default: SmolLM2-135M-Instruct")
    parser.add_argument("--order", type=Path, help="order file; needed without --tiny")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--drop", type=int, nargs="+", default=[5, 14, 17, 18], help="whole layers")
    parser.add_argument("--export", default="plain")
    parser.add_argument("--arms", nargs="+", choices=("labels", "stored", "online"), default=None)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--passes", type=float, default=6.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4, help="samples in an update")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--lambda", dest="lambda_", type=float, default=0.1, help="weight of the labels")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--interval", type=int, default=6, help="updates between two points of the curves")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="fusemega-prune-heal-"))
    if args.tiny:
        _make_tiny(args, work)
    elif args.order is None:
        parser.error("--order: needed without --tiny")
    whole, arms = args.model or str(smollm2()), args.arms or ["labels", "stored", "online"]
    blocks = len(read_order(args.order).removed(args.blocks))

    steps = PruneSteps(work / "out", args.nproc, {}, {"dtype": args.dtype})
    sources = {"train": chat_data().train, "chat": chat_data().held_out}
    sources |= {kind: domain_data(kind).held_out for kind in DOMAINS}
    chosen = {name: str(steps.folder / "data" / f"{name}.jsonl") for name in sources}
    files = [
        {"source": str(path), "out": chosen[name], "tokens": args.tokens if name == "train" else MEASURED}
        for name, path in sources.items()
    ]
    settings = {"models": [whole], "files": files, "seq_length": SEQ_LENGTH}
    steps.call("data", choose_rows, settings, {"whole": whole}, {n: str(p) for n, p in sources.items()}, chosen)
    texts = {kind: chosen[kind] for kind in ("chat", *DOMAINS)}
    rows = {"path": chosen["train"], "seq_length": SEQ_LENGTH}

    targets = {"layers": str(steps.folder / "layers"), "blocks": steps.prune_apply(
        whole, str(args.order), blocks, args.export
    )}  # fmt: skip
    dropped = {"model": whole, "out": targets["layers"], "drop": args.drop}
    steps.call("layers", cut, dropped, {"model": whole}, outputs={"model": targets["layers"]})
    store = steps.teach("whole", whole, rows, top_k=TOP_K)
    objectives: dict[str, dict[str, Any]] = {
        "labels": {"name": "sft"},
        "stored": {"name": "distill", "store": store, "lambda": args.lambda_},
        "online": {
            "name": "online_distill",
            "teacher": {"load": whole, "dtype": args.dtype},
            "lambda": args.lambda_,
        },
    }
    optimizer = {"lr": args.lr, "lr_warmup_fraction": 0.1, "adam_beta2": 0.95}
    length: dict[str, Any] = {"train_iters": 1} if args.tiny else {"train_epochs": args.passes}
    length |= {"global_batch_size": args.batch, "save_interval": 1000, "keep_checkpoints": 1}
    held_out = {"data": {"path": chosen["chat"], "seq_length": SEQ_LENGTH}, "interval": args.interval}
    models: dict[str, list[str]] = {"whole": [whole]}
    for target, folder in targets.items():
        models[f"{target}/pruned"] = [folder]
        for arm in arms:
            models[f"{target}/{arm}"] = [
                steps.train(
                    f"{target}-{arm}-{number}",
                    folder,
                    rows,
                    objectives[arm],
                    optimizer,
                    length | {"seed": 1234 + number},
                    held_out,
                )
                for number in range(args.seeds)
            ]
    for name, loads in models.items():
        for number, load in enumerate(loads):
            stage = f"measure-{name.replace('/', '-')}-{number}"
            evaluation: dict[str, Any] = {"model": {"load": load, "dtype": args.dtype}}
            read = {"model": load}
            if name != "whole":
                evaluation["reference"] = {"load": whole, "dtype": args.dtype}
                read["reference"] = whole
            evaluation["data"] = {"path": chosen["chat"], "seq_length": SEQ_LENGTH}
            run_file = str(steps.folder / f"{stage}.yaml")
            asked = {"evaluation": evaluation, "texts": texts, "run_file": run_file}
            steps.call(stage, measure, asked, read, texts, run_file=run_file)
    results = run(steps.graph()).results

    found: dict[str, Any] = {}
    for name, loads in models.items():
        seeds = [results[f"measure-{name.replace('/', '-')}-{number}"] for number in range(len(loads))]
        found[name] = {
            kind: {key: spread([one[kind][key] for one in seeds]) for key in SHOWN if key in of}
            for kind, of in seeds[0].items()
        }
        print(name, json.dumps(found[name]), flush=True)
    curves = {f"{t}/{arm}": _curve(steps.folder / f"{t}-{arm}-0") for t in targets for arm in arms}
    parameters = {name: _parameters(folder) for name, folder in {"whole": whole, **targets}.items()}
    names = ("blocks", "drop", "tokens", "passes", "seeds", "batch", "lr", "lambda_", "dtype", "tiny")
    print(
        json.dumps(
            {
                "benchmark": "prune_heal",
                **{name: getattr(args, name) for name in names},
                "parameters": parameters,
                "equal": parameters["blocks"] / parameters["layers"] - 1,
                "measures": found,
                "curves": curves,
            }
        )
    )


def _make_tiny(args: argparse.Namespace, work: Path) -> None:
    """A random model, an order for it, and settings of one update."""
    work.mkdir(parents=True, exist_ok=True)
    args.model, args.order = str(work / "model"), work / "order.json"
    args.drop, args.blocks, args.tokens, args.interval = [1], 2, 400, 1
    if not args.order.exists():
        chat = tiny.write_chat(work / "chat.jsonl", rows=40, characters=200)
        tiny.write_model(work / "model", chat, num_hidden_layers=3)
        steps = (Step(ResidualBlock("mlp", 0)), Step(ResidualBlock("mha", 1)))
        Order(steps, "mix").write(args.order)


def _curve(folder: Path) -> list[tuple[int, float]]:
    """(tokens trained on, bits per byte on held-out chat) at each evaluation."""
    trained, tokens = {0: 0}, 0
    for row in read_metrics(folder):
        tokens += int(row["tokens"])
        trained[int(row["iteration"])] = tokens
    return [(trained[int(row["iteration"])], round(row["bits_per_byte"], 4)) for row in read_evaluations(folder)]


def _parameters(folder: str) -> int:
    return sum(math.prod(shape) for shape in HFFolder(folder).architecture.hf_shapes().values())


if __name__ == "__main__":
    main()
