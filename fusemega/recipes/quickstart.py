"""A real teacher's knowledge into a real target, on a machine without a GPU, through tensor and pipeline parallelism.

    python -m fusemega.recipes.quickstart [--smoke | --full] [--teacher HF] [--target HF] [--out FOLDER] ...

The teacher is SmolLM2-135M-Instruct; the target is the same model with a third of its layers cut out. The teacher's
ten most probable tokens at every supervised position of real chat text are stored; then two copies of the target are
trained on the same tokens: `control` on the labels alone, `fused` on labels and the teacher's rows. Held-out bits per
byte of all four models are printed and plotted as they come out. The run files are left in the folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fusemega.runtime.console import quiet_megatron, say

quiet_megatron()

from fusemega import assets  # noqa: E402  (after the filters are set)
from fusemega.checkpoint.output import write_durably  # noqa: E402
from fusemega.errors import UserError  # noqa: E402
from fusemega.recipes.stages import Stages  # noqa: E402
from fusemega.training.records import read_metrics  # noqa: E402

# Of the ten consecutive layers that could go, the middle ones hurt least (cross-entropy 1.96 -> 4.89 nats on eight
# training conversations; 5.41 without layers 4 to 13, 9.63 without 16 to 25).
CUT_LAYERS = range(12, 22)
SEQ_LENGTH = 512
TOP_K = 10


@dataclass(frozen=True)
class Scale:
    """How much of everything. `train_iters` cuts a run short of its one pass over the tokens."""

    train_tokens: int
    held_out_rows: int
    global_batch_size: int
    train_iters: int | None


SCALES = {
    "smoke": Scale(train_tokens=1_200, held_out_rows=2, global_batch_size=2, train_iters=2),
    "default": Scale(train_tokens=16_384, held_out_rows=16, global_batch_size=4, train_iters=None),
    "full": Scale(train_tokens=49_152, held_out_rows=32, global_batch_size=4, train_iters=None),
}


def quickstart(options: argparse.Namespace, scale: Scale) -> dict[str, Any]:
    """Run every stage that is not finished yet; returns what summary.json holds.

    Raises:
        UserError: a model or data file that does not fit; names it.
    """
    folder = Path(options.out)
    parallel = {
        "tensor_model_parallel_size": options.tp,
        "pipeline_model_parallel_size": options.pp,
    }
    stages = Stages(folder, options.tp * options.pp)
    begun = time.monotonic()

    teacher = options.teacher or str(assets.smollm2())
    _link(folder / "teacher", teacher)
    train_source, held_out_source = _data_sources(options)
    sizes = {"tokens": scale.train_tokens, "held_out_rows": scale.held_out_rows, "seq_length": SEQ_LENGTH}
    train_file, held_out_file = folder / "data" / "train.jsonl", folder / "data" / "held_out.jsonl"
    data = stages.run(
        "data",
        {"teacher": teacher, "train": str(train_source), "held_out": str(held_out_source), **sizes},
        lambda: _choose_data(teacher, train_source, held_out_source, train_file, held_out_file, scale),
        (folder / "data",),
    )
    target = options.target or str(folder / "target")
    if options.target is None:
        stages.run(
            "target",
            {"teacher": teacher, "cut": list(CUT_LAYERS)},
            lambda: _cut(teacher, Path(target)),
            (Path(target),),
        )

    def model(load: str) -> dict[str, Any]:
        return {"load": load, "dtype": options.dtype}

    rows = {"path": str(train_file), "seq_length": SEQ_LENGTH}
    store = folder / "store"
    teach = {"model": model(teacher), "parallel": parallel, "data": rows, "store": str(store), "top_k": TOP_K}
    stages.run("teach", teach, partial(stages.command, "teach", "teach", teach), (store,))

    length = {"train_iters": scale.train_iters} if scale.train_iters else {"train_epochs": 1.0}
    objectives = {
        "control": {"name": "sft"},
        "fused": {"name": "distill", "store": str(store), "lambda": options.lambda_, "tail": "residual"},
    }
    for arm, objective in objectives.items():
        run = {
            "output_dir": str(folder / arm),
            "model": model(target),
            "parallel": parallel,
            "data": rows,
            "objective": objective,
            "optimizer": {"lr": options.lr, "lr_warmup_fraction": 0.1, "adam_beta2": 0.95},
            "training": {"global_batch_size": scale.global_batch_size, "save_interval": 10, **length},
        }
        stages.run(arm, run, partial(stages.command, "train", arm, run), (folder / arm,))

    models = {"target": target, "control": str(folder / "control/hf"), "fused": str(folder / "fused/hf")}
    results = {}
    for name, load in (models | {"teacher": teacher}).items():
        evaluation = {"model": model(load), "data": {"path": str(held_out_file), "seq_length": SEQ_LENGTH}}
        stages.write_run_file("eval", f"eval-{name}", evaluation, nproc=1)
        results[name] = stages.run(f"eval-{name}", evaluation, partial(_evaluate, evaluation))

    sentence = stages.run("sentence", options.prompt, lambda: _sentence(models["fused"], options.prompt))
    curves = {arm: _curve(folder / arm) for arm in objectives}
    summary = {
        "teacher": teacher,
        "target": target,
        "layout": {"processes": options.tp * options.pp, "TP": options.tp, "PP": options.pp},
        "data": data,
        "train_tokens": {arm: curve[-1][0] for arm, curve in curves.items()},
        "bits_per_byte": {name: result["bits_per_byte"] for name, result in results.items()},
        "held_out": {key: results["target"][key] for key in ("samples", "tokens", "bytes")},
        "fused_folder": models["fused"],
        "prompt": options.prompt,
        "sentence": sentence,
        "seconds_this_time": round(time.monotonic() - begun, 1),
    }
    write_durably(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    from fusemega.report.plots import plot_arms

    plot_arms(summary["bits_per_byte"], curves, "fusemega quickstart", folder / "summary.png")
    return summary


def _link(place: Path, teacher: str) -> None:
    """The folder's teacher by a name that run files can use."""
    from fusemega.checkpoint.hub import resolve

    target = resolve(teacher).resolve()
    if place.is_symlink():
        place.unlink()
    place.symlink_to(target)


def _data_sources(options: argparse.Namespace) -> tuple[Path, Path]:
    if (options.train is None) != (options.held_out is None):
        raise UserError("--train and --held-out: give both or neither")
    if options.train is not None:
        return Path(options.train), Path(options.held_out)
    chat = assets.chat_data()
    return chat.train, chat.held_out


def _choose_data(
    teacher: str, train: Path, held_out: Path, train_out: Path, held_out_out: Path, scale: Scale
) -> dict[str, int]:
    """The first whole conversations of `train` that fit in the token budget, and the first held-out rows."""
    from fusemega.checkpoint.hub import resolve
    from fusemega.text.data import DataConfig
    from fusemega.text.dataset import prepare
    from fusemega.text.tokenizer import Tokenizer

    config = DataConfig(path=str(train), seq_length=SEQ_LENGTH)
    samples = prepare(config, Tokenizer.load(resolve(teacher)), assets.cache_folder() / "data", progress=True)
    lines = train.read_text(encoding="utf-8").splitlines()
    last_row, tokens = 0, 0
    per_row: dict[int, int] = {}
    for sample in samples:
        row = int(sample.source.rsplit(":", 1)[1])
        per_row[row] = per_row.get(row, 0) + len(sample.ids)
    for row, length in sorted(per_row.items()):
        if tokens + length > scale.train_tokens:
            break
        last_row, tokens = row, tokens + length
    if not tokens:
        raise UserError(f"{train}: its first conversation alone has more than {scale.train_tokens} tokens")
    train_out.parent.mkdir(parents=True, exist_ok=True)
    write_durably(train_out, "\n".join(lines[:last_row]) + "\n")
    kept = held_out.read_text(encoding="utf-8").splitlines()[: scale.held_out_rows]
    write_durably(held_out_out, "\n".join(kept) + "\n")
    return {"train_rows": last_row, "train_tokens": tokens, "held_out_rows": len(kept)}


def _cut(teacher: str, target: Path) -> list[int]:
    from fusemega.checkpoint.cut_layers import cut_layers
    from fusemega.checkpoint.hub import resolve
    from fusemega.runtime.parallel import ParallelConfig, initialize

    cut_layers(resolve(teacher), target, CUT_LAYERS, initialize(ParallelConfig()))
    return list(CUT_LAYERS)


def _evaluate(evaluation: dict[str, Any]) -> dict[str, Any]:
    """`fusemega eval` in this process: one model of this size needs no launch."""
    from fusemega.config import validate
    from fusemega.scoring.evaluate import EvalRun, evaluate

    return evaluate(validate(EvalRun, evaluation, "eval"))[0].model_dump()


def _curve(output: Path) -> list[tuple[float, float]]:
    """(tokens trained on so far, cross-entropy on labels) of each update."""
    points, tokens = [], 0.0
    for row in read_metrics(output):
        tokens += row["tokens"]
        points.append((tokens, row["lm loss"]))
    return points


def _sentence(folder: str, prompt: str) -> str:
    """What transformers, loading the exported folder, answers greedily."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def _table(summary: dict[str, Any]) -> str:
    held_out, tokens = summary["held_out"], summary["train_tokens"]
    lines = [
        "",
        f"held-out bits per byte ({held_out['samples']} samples, {held_out['bytes']} bytes; lower is better)",
        *(f"  {name:<8} {value:.4f}" for name, value in summary["bits_per_byte"].items()),
        f"trained on {tokens['control']:.0f} tokens (control) and {tokens['fused']:.0f} (fused)",
        f"{summary['fused_folder']}, loaded by transformers, answers {summary['prompt']!r}:",
        f"  {summary['sentence']!r}",
    ]
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fusemega.recipes.quickstart", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--smoke", dest="scale", action="store_const", const="smoke", help="two updates")
    size.add_argument("--full", dest="scale", action="store_const", const="full", help="three times the tokens")
    parser.add_argument("--teacher", help="HF folder or hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--target", help="HF folder or hub id with the teacher's tokenizer (default: the teacher, cut)")
    parser.add_argument("--train", help="JSONL of conversations to train on (default: AlpacaEval's)")
    parser.add_argument("--held-out", help="JSONL of conversations to measure on")
    parser.add_argument("--out", help="output folder (default: runs/quickstart, with the scale's name if given)")
    parser.add_argument("--tp", type=int, default=3, help="tensor-parallel ranks (default 3: the model has 3 KV heads)")
    parser.add_argument("--pp", type=int, default=2, help="pipeline stages (default 2)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="default fp32, faster on most CPUs")
    parser.add_argument("--lr", type=float, default=3e-4, help="peak learning rate of both arms (default 3e-4)")
    parser.add_argument(
        "--lambda", dest="lambda_", type=float, default=0.1, help="weight of the labels in `fused` (default 0.1)"
    )
    parser.add_argument("--prompt", default="What is the capital of France?", help="what the fused model is asked")
    options = parser.parse_args()
    scale = options.scale or "default"
    options.out = options.out or ("runs/quickstart" if scale == "default" else f"runs/quickstart-{scale}")
    try:
        summary = quickstart(options, SCALES[scale])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    say(f"wrote {options.out}/summary.json and summary.png")
    print(_table(summary))


if __name__ == "__main__":
    main()
