"""A stronger teacher of another family against labels alone: what each way of reading its rows gives the target.

    python benchmarks/fusion_real.py --teacher FOLDER [--kind code] [--arms labels cells:0.5 ...] [--seeds 3]

`--teacher` is a Hugging Face folder with another tokenizer than the target's, Qwen2.5-Coder-0.5B-Instruct for example;
the target is SmolLM2-135M-Instruct, or `--target`. Every arm trains a copy of the target on the same `--tokens` tokens
of `--kind`, `--passes` times. An arm is a name, behind a colon the weight of the labels (lambda), and behind an @ other
passes than `--passes`: `cells:0.5@2`.

    labels           the labels alone
    cells            `fuse` with a map of cells, the default
    row_ends         the same, and the ends of texts are taught by the rows too (`text_end: row`)
    first_piece      `fuse` with a map of first pieces
    consistent       the same without positions whose next token is longer than the teacher's (`consistent: true`)
    project_student  the objective of that name, X-Token's
    chunk            the objective of that name, ALM's
    merge            the objective of that name, GOLD's
    same             `distill` from a teacher of the target's own tokenizer and size: the target, trained on other text
                     of the same kind

Measured by transformers in fp32 on held-out text of the kind and of three that no arm was trained on: bits per byte; of
these, what the ends of texts cost; the distance to the teacher, KL over cells in nats at shared positions. And on the
held-out text of the kind, nats per label: of line breaks with the indentation after them, of digits in numbers of
several digits, and of tokens that the training text does not have. Seeds decide the order of the data. What is finished
is skipped the next time. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from seeds import spread

from fusemega.fixtures.data import chat_data, domain_data, smollm2
from fusemega.pipeline.functions import stage_function
from fusemega.pipeline.run import run
from fusemega.recipes.prepare import choose_rows
from fusemega.recipes.steps import Steps

KINDS = ("code", "chat", "maths", "encyclopedia")
SEQ_LENGTH, TOP_K = 1024, 10
HELD_OUT_CODE = 44  # rows of the training file that are held out as well: of code, only ten are
MEASURED = {"trained": 4096, "other": 1536}  # tokens
MAPS = {"cells": "cells", "row_ends": "cells", "first_piece": "first_piece", "consistent": "first_piece"}


@stage_function
def split(kind: str, out: str) -> dict[str, int]:
    """Files of rows without overlap: the target's text, the other teacher's, and held-out text of every kind."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name in KINDS:
        data = chat_data() if name == "chat" else domain_data(name)
        train, held_out = (path.read_text(encoding="utf-8").split("\n")[:-1] for path in data)
        if name == "code":
            held_out, train = held_out + train[:HELD_OUT_CODE], train[HELD_OUT_CODE:]
        files = {f"held_out_{name}": held_out}
        if name == kind:
            files |= {"train": train[::2], "other": train[1::2]}
        for file, rows in files.items():
            (folder / f"{file}.jsonl").write_text("".join(row + "\n" for row in rows), encoding="utf-8")
            counts[file] = len(rows)
    return counts


@stage_function
def measure(model: str, texts: dict[str, str], stores: dict[str, str], map: str, trained: str, kind: str) -> Any:
    """Kind of text -> measures of one model; see the head of this file.

    Args:
        stores: kind -> the teacher's rows of that text.
        map: a map of cells from the teacher's tokenizer to the model's.
        trained: the training text, which decides what is rare.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from fusemega.align.vocabulary import Vocabulary
    from fusemega.align.vocabulary_map import VocabularyMap
    from fusemega.files.cache import cache_folder
    from fusemega.store import Store
    from fusemega.text.data import DataConfig
    from fusemega.text.dataset import prepare
    from fusemega.text.tokenizer import Tokenizer

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = Tokenizer.load(model)
    vocabulary, cells = Vocabulary.of(tokenizer), VocabularyMap.load(map)

    def samples(path: str) -> Any:
        return prepare(DataConfig(path=path, seq_length=SEQ_LENGTH), tokenizer, cache_folder() / "data")

    seen = Counter(int(i) for sample in samples(trained) for i in sample.ids)
    result: dict[str, dict[str, float]] = {}
    for name, path in texts.items():
        store, sums, classes = Store.open(stores[name]), Counter[str](), dict[str, list[float]]()
        for sample in samples(path):
            with torch.inference_mode():
                ids = torch.from_numpy(sample.ids.astype(np.int64))[None]
                logits = network(ids).logits[0, torch.from_numpy(sample.positions)].double()
            logp = logits.log_softmax(-1).numpy()
            labels = sample.ids[sample.positions + 1].astype(np.int64)
            nll = -logp[np.arange(len(labels)), labels]
            ends = labels == tokenizer.eos_id
            sums.update(nats=nll.sum(), end_nats=nll[ends].sum(), bytes=sample.num_bytes, tokens=len(labels))
            if name == kind:
                for of, label, one in zip(_classes(labels, vocabulary.contents, seen), labels, nll, strict=True):
                    if of and label != tokenizer.eos_id:
                        classes.setdefault(of, []).append(float(one))
            row = store.get(sample.key)
            if row is not None:
                sums.update(_distance(row, sample, labels, logp, cells, ends))
        bits = math.log(2) * sums["bytes"]
        result[name] = {
            "bits_per_byte": sums["nats"] / bits,
            "end_bits_per_byte": sums["end_nats"] / bits,
            "kl_cells": sums["kl"] / max(sums["shared"], 1),
            "tokens": sums["tokens"],
        }
        if classes:
            result[name] |= {f"nats_{of}": statistics.fmean(nats) for of, nats in classes.items()}
            result[name] |= {f"count_{of}": len(nats) for of, nats in classes.items()}
    return result


def _classes(labels_P: np.ndarray, contents: Sequence[bytes | None], seen: Mapping[int, int]) -> list[str]:
    """What is measured apart: "indentation", "digits" of numbers with several, "rare", or "" for the rest."""
    texts = [(contents[label] or b"").decode(errors="replace") for label in labels_P.tolist()]
    found = []
    for place, (text, label) in enumerate(zip(texts, labels_P.tolist(), strict=True)):
        before, after = texts[place - 1] if place else "", texts[place + 1] if place + 1 < len(texts) else ""
        if "\n" in text and not text.strip() and text.endswith((" ", "\t")):
            found.append("indentation")
        elif text.strip().isdigit() and (before[-1:].isdigit() or after[:1].isdigit()):
            found.append("digits")
        else:
            found.append("" if label in seen else "rare")
    return found


def _distance(row: Any, sample: Any, labels_P: np.ndarray, logp_PV: np.ndarray, cells: Any, ends_P: np.ndarray) -> Any:
    """Sums over the shared positions, without contents' first tokens and ends of texts: KL over cells, their number."""
    from fusemega.align.positions import shared_positions
    from fusemega.align.projection import project
    from fusemega.text.sample import BEGINS

    positions_P = sample.positions
    source_M, target_M = shared_positions(row.end_bytes, sample.end_bytes[positions_P])
    kept_M = ~(sample.is_place(BEGINS)[positions_P[target_M]] | ends_P[target_M])
    source_M, target_M = source_M[kept_M], target_M[kept_M]
    table_S = np.pad(cells.table_S, (0, 1 << 16), constant_values=-1)  # rows of a model beyond its tokenizer's ids
    ids_MK, logp_MK, rest_M = project(
        row.ids_PK[source_M], row.logp_PK[source_M], row.log_residual_P[source_M], table_S
    )
    q_MV = np.zeros((len(target_M), logp_PV.shape[1]))
    cell_T = np.arange(logp_PV.shape[1])
    cell_T[: len(cells.cell_T)] = cells.cell_T
    order = np.argsort(cell_T, kind="stable")
    starts = np.flatnonzero(np.diff(cell_T[order], prepend=-1))
    q_MV[:, cell_T[order][starts]] = np.add.reduceat(np.exp(logp_PV[target_M])[:, order], starts, axis=1)
    listed_MK = ids_MK >= 0
    p_MK = np.where(listed_MK, np.exp(logp_MK.astype(np.float64)), 0.0)
    q_MK = np.where(listed_MK, np.take_along_axis(q_MV, np.maximum(ids_MK, 0), 1), 0.0)
    p_rest_M = np.exp(rest_M.astype(np.float64))
    q_rest_M = np.maximum(1 - q_MK.sum(1), 1e-12)
    terms = np.where(p_MK > 0, p_MK * np.log(np.maximum(p_MK, 1e-300) / np.maximum(q_MK, 1e-300)), 0.0).sum(1)
    terms += np.where(p_rest_M > 0, p_rest_M * np.log(np.maximum(p_rest_M, 1e-300) / q_rest_M), 0.0)
    return {"kl": float(terms.sum()), "shared": len(target_M)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="Hugging Face folder")
    parser.add_argument("--target", default=None, help="Hugging Face folder; default: SmolLM2-135M-Instruct")
    parser.add_argument("--kind", choices=("code", "chat"), default="code")
    parser.add_argument("--arms", nargs="+", default=["labels", "cells:0.1", "cells:0.5", "cells:0.9"])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--passes", type=float, default=3.0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8, help="samples in an update")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--measured", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of held-out text")
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="fusemega-fusion-real-"))
    steps = Steps(work, args.nproc, {}, {"dtype": args.dtype})
    target, data = args.target or str(smollm2()), work / "data"

    rows = {name: str(data / f"{name}.jsonl") for name in ("train", "other", *(f"held_out_{kind}" for kind in KINDS))}
    steps.call("split", split, {"kind": args.kind, "out": str(data)}, {}, outputs=rows)
    chosen = {name: str(work / "rows" / f"{name}.jsonl") for name in rows}
    budgets = dict.fromkeys(("train", "other"), args.tokens)
    budgets |= {f"held_out_{k}": MEASURED["trained" if k == args.kind else "other"] for k in KINDS}
    files = [{"source": rows[name], "out": chosen[name], "tokens": budgets[name]} for name in rows]
    settings = {"models": [target, args.teacher], "files": files, "seq_length": SEQ_LENGTH}
    steps.call("rows", choose_rows, settings, {"target": target, "teacher": args.teacher}, rows, chosen)
    texts = {kind: chosen[f"held_out_{kind}"] for kind in args.measured}
    text = {"path": chosen["train"], "seq_length": SEQ_LENGTH}

    maps = {kind: steps.align(kind, args.teacher, target, "--kind", kind) for kind in ("cells", "first_piece", "exact")}
    taught = steps.teach("train", args.teacher, text, top_k=TOP_K)
    stores = {
        kind: steps.teach(kind, args.teacher, {"path": path, "seq_length": SEQ_LENGTH}, top_k=TOP_K)
        for kind, path in texts.items()
    }
    optimizer = {"lr": args.lr, "lr_warmup_fraction": 0.1, "adam_beta2": 0.95}
    length = {"train_epochs": args.passes, "global_batch_size": args.batch}
    length |= {"save_interval": 1000, "keep_checkpoints": 1}
    models = {"target": [target]}
    for arm in args.arms:
        named, _, passes = arm.partition("@")
        name, _, weight = named.partition(":")
        teacher: dict[str, Any] = {"store": taught, "map": maps[MAPS.get(name, "cells")]}
        objective: dict[str, Any] = {"name": "sft"}
        if name in MAPS:
            objective = {"name": "fuse", "teachers": [teacher]}
            if name == "consistent":
                teacher["consistent"] = True
            if name == "row_ends":
                objective["text_end"] = "row"
        elif name == "same":
            other = {"path": chosen["other"], "seq_length": SEQ_LENGTH}
            if "teacher-same" not in {stage.name for stage in steps.stages}:
                once = length | {"train_epochs": 2.0}
                tuned = steps.train("teacher-same", target, other, {"name": "sft"}, optimizer, once)
                same = steps.teach("same", tuned, text, top_k=TOP_K)
                models["teacher-same"] = [tuned]
            objective = {"name": "distill", "store": same}
        elif name == "chunk":
            objective = {"name": name, "store": taught}
        elif name == "project_student":
            objective = {"name": name, "store": taught, "tokenizer": args.teacher}
        elif name == "merge":
            objective = {"name": name, "store": taught, "map": maps["exact"]}
        elif name != "labels":
            parser.error(f"--arms {arm}: no such arm")
        if weight:
            objective["lambda"] = float(weight)
        taking = length | {"train_epochs": float(passes or args.passes)}
        models[arm] = [
            steps.train(f"{_stage(arm)}-{s}", target, text, objective, optimizer, taking | {"seed": 1234 + s})
            for s in range(args.seeds)
        ]
    for arm, folders in models.items():
        for number, folder in enumerate(folders):
            settings = {"model": folder, "texts": texts, "stores": stores, "map": maps["cells"]}
            settings |= {"trained": chosen["train"], "kind": args.kind}
            inputs = texts | {f"store.{kind}": store for kind, store in stores.items()} | {"map": maps["cells"]}
            steps.call(f"measure-{_stage(arm)}-{number}", measure, settings, {"model": folder}, inputs)
    results = run(steps.graph()).results
    found: dict[str, Any] = {}
    for arm, folders in models.items():
        of_seeds = [results[f"measure-{_stage(arm)}-{number}"] for number in range(len(folders))]
        found[arm] = {k: {m: spread([s[k][m] for s in of_seeds]) for m in of} for k, of in of_seeds[0].items()}
        print(arm, json.dumps(found[arm]), flush=True)
    names = ("kind", "tokens", "passes", "batch", "seeds", "lr", "dtype")
    print(json.dumps({"benchmark": "fusion_real", **{n: getattr(args, n) for n in names}, "measures": found}))


def _stage(arm: str) -> str:
    return arm.replace(":", "-").replace("@", "-p")


if __name__ == "__main__":
    main()
