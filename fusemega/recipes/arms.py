"""What the quickstarts share: copies ("arms") of one target trained on the same tokens, then measured side by side."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fusemega import assets
from fusemega.errors import UserError
from fusemega.files.output import write_durably
from fusemega.files.owned import replace_link
from fusemega.recipes.stages import Stages
from fusemega.runtime.console import say
from fusemega.training.records import read_metrics

SEQ_LENGTH = 512
TOP_K = 10
# Of the ten consecutive layers that could go, the middle ones hurt least (cross-entropy 1.96 -> 4.89 nats on eight
# training conversations; 5.41 without layers 4 to 13, 9.63 without 16 to 25).
CUT_LAYERS = range(12, 22)


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


class Arms:
    """A pipeline's stages, its data and the settings that all arms have in common.

    Args:
        options: of the command line, from `parser`.
        scale: how much of everything.
    """

    def __init__(self, options: argparse.Namespace, scale: Scale) -> None:
        self.options, self.scale, self.folder = options, scale, Path(options.out)
        self.stages = Stages(self.folder, options.tp * options.pp)
        self.parallel = {"tensor_model_parallel_size": options.tp, "pipeline_model_parallel_size": options.pp}
        self.train_file = self.folder / "data" / "train.jsonl"
        self.held_out_file = self.folder / "data" / "held_out.jsonl"
        self.rows = {"path": str(self.train_file), "seq_length": SEQ_LENGTH}

    def choose_data(self, models: Sequence[str]) -> dict[str, int]:
        """The text to train on and to measure on, of a size that suits the tokenizers of all `models`.

        Tokens are the first model's. With several tokenizers, conversations longer than a window of one of them are
        left out: windows that tokenizers cut at different bytes are no common samples.
        """
        options, scale = self.options, self.scale
        if (options.train is None) != (options.held_out is None):
            raise UserError("--train and --held-out: give both or neither")
        files = assets.chat_data() if options.train is None else (Path(options.train), Path(options.held_out))
        sizes = {"tokens": scale.train_tokens, "held_out_rows": scale.held_out_rows, "seq_length": SEQ_LENGTH}
        settings = {"models": list(models), "files": list(map(str, files)), **sizes}
        inputs = [*map(_resolved, models), *files]
        work = partial(self._choose, models, *files)
        return self.stages.run("data", settings, work, (self.folder / "data",), inputs)

    def cut(self, model: str, out: Path) -> str:
        """`model` without `CUT_LAYERS`, as folder `out`."""
        settings = {"model": model, "cut": list(CUT_LAYERS)}
        self.stages.run("cut", settings, partial(cut_middle, model, out), (out,), [_resolved(model)])
        return str(out)

    def model(self, load: str) -> dict[str, Any]:
        """A run file's `model`."""
        return {"load": load, "dtype": self.options.dtype}

    def teach(self, name: str, teacher: str) -> str:
        """A teacher's rows of the training data, as stage `name`. Returns the store's folder."""
        store = self.folder / "stores" / name
        run: dict[str, Any] = {"model": self.model(teacher), "parallel": self.parallel, "data": self.rows}
        run |= {"store": str(store), "top_k": TOP_K}
        work = partial(self.stages.command, "teach", f"teach-{name}", run)
        self.stages.run(f"teach-{name}", run, work, (store,), [_resolved(teacher)])
        return str(store)

    def train(self, target: str, objectives: Mapping[str, Mapping[str, Any]]) -> None:
        """One copy of `target` an objective, on the same tokens."""
        scale = self.scale
        length = {"train_iters": scale.train_iters} if scale.train_iters else {"train_epochs": 1.0}
        for arm, objective in objectives.items():
            run = {
                "output_dir": str(self.folder / arm),
                "model": self.model(target),
                "parallel": self.parallel,
                "data": self.rows,
                "objective": dict(objective),
                "optimizer": {"lr": self.options.lr, "lr_warmup_fraction": 0.1, "adam_beta2": 0.95},
                "training": {"global_batch_size": scale.global_batch_size, "save_interval": 10, **length},
            }
            work = partial(self.stages.command, "train", arm, run)
            self.stages.run(arm, run, work, (self.folder / arm,), [_resolved(target)])

    def finish(
        self, target: str, arms: Sequence[str], teachers: Mapping[str, str], title: str, started: float
    ) -> dict[str, Any]:
        """Measure everything on the held-out text; write summary.json and summary.png. Returns what the former holds.

        Args:
            target: the model that every arm began as.
            arms: those that were trained; the last answers the prompt.
            teachers: name -> folder.
            title: of the picture.
            started: `time.monotonic()` of then.
        """
        models = {"target": target} | {arm: str(self.folder / arm / "hf") for arm in arms}
        results = {}
        for name, load in (models | dict(teachers)).items():
            held_out = {"path": str(self.held_out_file), "seq_length": SEQ_LENGTH}
            evaluation = {"model": self.model(load), "data": held_out}
            self.stages.write_run_file("eval", f"eval-{name}", evaluation, nproc=1)
            results[name] = self.stages.run(f"eval-{name}", evaluation, partial(evaluate_here, evaluation))
        last, prompt = models[arms[-1]], self.options.prompt
        curves = {arm: _curve(self.folder / arm) for arm in arms}
        summary = {
            "teachers": dict(teachers),
            "target": target,
            "layout": {"processes": self.stages.nproc, "TP": self.options.tp, "PP": self.options.pp},
            "train_tokens": {arm: curve[-1][0] for arm, curve in curves.items()},
            "bits_per_byte": {name: result["bits_per_byte"] for name, result in results.items()},
            "held_out": {key: results["target"][key] for key in ("samples", "tokens", "bytes")},
            "fused_folder": last,
            "prompt": prompt,
            "sentence": self.stages.run("sentence", prompt, lambda: _sentence(last, prompt)),
            "seconds_this_time": round(time.monotonic() - started, 1),
        }
        write_durably(self.folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        from fusemega.report.plots import plot_arms

        plot_arms(summary["bits_per_byte"], curves, title, self.folder / "summary.png")
        return summary

    def _choose(self, models: Sequence[str], train: Path, held_out: Path) -> dict[str, int]:
        rows = _lengths(models, train)
        chosen, tokens = [], 0
        for row, length in sorted(rows.items()):
            if tokens + length > self.scale.train_tokens:
                break
            chosen.append(row)
            tokens += length
        if not chosen:
            raise UserError(f"{train}: its first conversation alone has more than {self.scale.train_tokens} tokens")
        kept = sorted(_lengths(models, held_out))[: self.scale.held_out_rows]
        self.train_file.parent.mkdir(parents=True, exist_ok=True)
        for source, numbers, out in ((train, chosen, self.train_file), (held_out, kept, self.held_out_file)):
            lines = source.read_text(encoding="utf-8").splitlines()
            write_durably(out, "".join(lines[number - 1] + "\n" for number in numbers))
        return {"train_rows": len(chosen), "train_tokens": tokens, "held_out_rows": len(kept)}


def _resolved(model: str) -> Path:
    from fusemega.checkpoint.hub import resolve

    return Path(resolve(model))


def link(place: Path, model: str) -> None:
    """A model by a name inside the pipeline's folder, which run files can use."""
    from fusemega.checkpoint.hub import resolve

    replace_link(place, resolve(model).resolve())


def parser(prog: str, description: str | None, out: str, lr: float, lambda_: float) -> argparse.ArgumentParser:
    """The command line that the quickstarts share; `out`, `lr` and `lambda_` are defaults."""
    made = argparse.ArgumentParser(
        prog=f"python -m {prog}", description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    size = made.add_mutually_exclusive_group()
    size.add_argument("--smoke", dest="scale", action="store_const", const="smoke", help="two updates")
    size.add_argument("--full", dest="scale", action="store_const", const="full", help="three times the tokens")
    made.add_argument("--train", help="JSONL of conversations to train on (default: AlpacaEval's)")
    made.add_argument("--held-out", help="JSONL of conversations to measure on")
    made.add_argument("--out", help=f"output folder (default: {out}, with the scale's name if given)")
    made.add_argument("--tp", type=int, default=3, help="tensor-parallel ranks (default 3: the model has 3 KV heads)")
    made.add_argument("--pp", type=int, default=2, help="pipeline stages (default 2)")
    made.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="default fp32, faster on most CPUs")
    made.add_argument("--lr", type=float, default=lr, help=f"peak learning rate of every arm (default {lr})")
    made.add_argument(
        "--lambda",
        dest="lambda_",
        type=float,
        default=lambda_,
        help=f"weight of the labels in `fused` (default {lambda_})",
    )
    made.add_argument("--prompt", default="What is the capital of France?", help="what the fused model is asked")
    made.set_defaults(default_out=out)
    return made


def run(
    parser: argparse.ArgumentParser,
    pipeline: Callable[[argparse.Namespace, Scale], dict[str, Any]],
) -> None:
    """Parse, run, print what came out."""
    options = parser.parse_args()
    scale = options.scale or "default"
    options.out = options.out or (options.default_out if scale == "default" else f"{options.default_out}-{scale}")
    try:
        summary = pipeline(options, SCALES[scale])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    say(f"wrote {options.out}/summary.json and summary.png")
    print(_table(summary))


def cut_middle(model: str, out: Path) -> list[int]:
    """Writes `model` without `CUT_LAYERS` as folder `out`; returns those."""
    from fusemega.checkpoint.cut_layers import cut_layers
    from fusemega.checkpoint.hub import resolve
    from fusemega.runtime.parallel import ParallelConfig, initialize

    cut_layers(resolve(model), out, CUT_LAYERS, initialize(ParallelConfig()))
    return list(CUT_LAYERS)


def _lengths(models: Sequence[str], path: Path) -> dict[int, int]:
    """Row number -> its tokens under the first model's tokenizer, of the rows that suit the tokenizers of all."""
    from fusemega.checkpoint.hub import resolve
    from fusemega.text.data import DataConfig
    from fusemega.text.dataset import prepare
    from fusemega.text.tokenizer import Tokenizer

    common: dict[int, int] | None = None
    for model in models:
        config = DataConfig(path=str(path), seq_length=SEQ_LENGTH)
        samples = prepare(config, Tokenizer.load(resolve(model)), assets.cache_folder() / "data", progress=True)
        lengths: dict[int, int] = {}
        windows: dict[int, int] = {}
        for sample in samples:
            row = int(sample.source.rsplit(":", 1)[1])
            lengths[row] = lengths.get(row, 0) + len(sample.ids)
            windows[row] = windows.get(row, 0) + 1
        if len(models) > 1:
            lengths = {row: length for row, length in lengths.items() if windows[row] == 1}
        common = lengths if common is None else {row: n for row, n in common.items() if row in lengths}
    return common or {}


def evaluate_here(evaluation: dict[str, Any]) -> dict[str, Any]:
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
    held_out = summary["held_out"]
    tokens = ", ".join(f"{count:.0f} ({arm})" for arm, count in summary["train_tokens"].items())
    lines = [
        "",
        f"held-out bits per byte ({held_out['samples']} samples, {held_out['bytes']} bytes; lower is better)",
        *(f"  {name:<8} {value:.4f}" for name, value in summary["bits_per_byte"].items()),
        f"trained on tokens: {tokens}",
        f"{summary['fused_folder']}, loaded by transformers, answers {summary['prompt']!r}:",
        f"  {summary['sentence']!r}",
    ]
    return "\n".join(lines)
