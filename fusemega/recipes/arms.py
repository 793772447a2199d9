"""What the quickstarts share: copies ("arms") of one target trained on the same tokens, then measured side by side."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from fusemega.errors import UserError
from fusemega.files.cache import cache_folder
from fusemega.files.output import write_durably
from fusemega.files.owned import replace_link
from fusemega.fixtures import data as assets
from fusemega.recipes.measures import MEASURES, Found, answer, measure, panels, seen, table
from fusemega.recipes.stages import Stages
from fusemega.runtime.console import say
from fusemega.training.records import read_metrics

SEQ_LENGTH = 512
TOP_K = 10
TRAINED_KIND = "chat"  # the others are kinds that no arm is trained on
SEED = 1234
_SIZES = ("samples", "tokens", "bytes")
# Of SmolLM2-135M-Instruct's 30, found one by one: the layer whose removal costs least on three training conversations
# (cross-entropy 2.83 -> 2.91 -> 2.98 -> 3.08 -> 3.21 nats). A model that lost a third of its layers babbles, and
# neither run can recover from that in minutes.
CUT_LAYERS = (5, 14, 17, 18)


@dataclass(frozen=True)
class Scale:
    """How much of everything.

    Attributes:
        train_tokens: to train on, in each pass.
        measured_tokens: of each kind of text.
        passes: over the training tokens. Labels alone overfit after a few; a teacher's rows much later.
        train_iters: cuts a run short.
        seeds: how often each arm is trained; a seed decides the order of the data.
        answer_tokens: of each model's answer to the prompt.
    """

    train_tokens: int
    measured_tokens: int
    global_batch_size: int
    passes: float
    train_iters: int | None = None
    seeds: int = 1
    answer_tokens: int = 48


SCALES = {
    "smoke": Scale(600, 300, global_batch_size=2, passes=1, train_iters=2, answer_tokens=8),
    "default": Scale(4_000, 1_536, global_batch_size=4, passes=6),
    "full": Scale(16_384, 4_096, global_batch_size=4, passes=5, seeds=3),
}


class Arms:
    """A pipeline's stages, its data and the settings that all arms have in common.

    Args:
        options: of the command line, from `parser`.
        scale: how much of everything.
    """

    def __init__(self, options: argparse.Namespace, scale: Scale) -> None:
        self.options, self.scale, self.folder = options, scale, Path(options.out)
        self.stages = Stages(self.folder, options.nproc or options.tp * options.pp)
        self.parallel = {"tensor_model_parallel_size": options.tp, "pipeline_model_parallel_size": options.pp}
        self.train_file = self.folder / "data" / "train.jsonl"
        self.held_out_file = self.folder / "data" / "held_out.jsonl"
        self.texts = {kind: self.folder / "data" / f"{kind}.jsonl" for kind in assets.DOMAINS}
        self.texts = {TRAINED_KIND: self.held_out_file, **self.texts}
        self.rows = {"path": str(self.train_file), "seq_length": SEQ_LENGTH}

    def choose_data(self, models: Sequence[str]) -> dict[str, int]:
        """The text to train on and to measure on, of a size that suits the tokenizers of all `models`.

        Tokens are the first model's. With several tokenizers, conversations longer than a window of one of them are
        left out: windows that tokenizers cut at different bytes are no common samples.
        """
        options, scale = self.options, self.scale
        if (options.train is None) != (options.held_out is None):
            raise UserError("--train and --held-out: give both or neither")
        train, held_out = assets.chat_data() if options.train is None else (Path(options.train), Path(options.held_out))
        sources = {self.train_file: train, self.held_out_file: held_out}
        sources |= {self.texts[kind]: assets.domain_data(kind).held_out for kind in assets.DOMAINS}
        sizes = {"tokens": scale.train_tokens, "measured_tokens": scale.measured_tokens, "seq_length": SEQ_LENGTH}
        settings = {"models": list(models), "files": list(map(str, sources.values())), **sizes}
        inputs = [*map(_resolved, models), *sources.values()]
        work = partial(self._choose, models, sources)
        return self.stages.run("data", settings, work, (self.folder / "data",), inputs)

    def cut(self, model: str, out: Path) -> str:
        """`model` without `CUT_LAYERS`, as folder `out`."""
        settings = {"model": model, "cut": list(CUT_LAYERS)}
        self.stages.run("cut", settings, partial(cut, model, out, CUT_LAYERS), (out,), [_resolved(model)])
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
        """One copy of `target` an objective and seed, on the same tokens."""
        scale = self.scale
        length = {"train_iters": scale.train_iters} if scale.train_iters else {"train_epochs": float(scale.passes)}
        kept = {"save_interval": 25, "keep_checkpoints": 1}  # 1.4 GB each
        for arm, objective in objectives.items():
            for seed in range(scale.seeds):
                name = self.run_name(arm, seed)
                run = {
                    "output_dir": str(self.folder / name),
                    "model": self.model(target),
                    "parallel": self.parallel,
                    "data": self.rows,
                    "objective": dict(objective),
                    "optimizer": {"lr": self.options.lr, "lr_warmup_fraction": 0.1, "adam_beta2": 0.95},
                    "training": {"global_batch_size": scale.global_batch_size, "seed": SEED + seed, **length, **kept},
                }
                work = partial(self.stages.command, "train", name, run)
                self.stages.run(name, run, work, (self.folder / name,), [_resolved(target)])

    def run_name(self, arm: str, seed: int) -> str:
        """Of an arm's run with the seed of that number: the first has the arm's name."""
        return arm if seed == 0 else f"{arm}-{seed + 1}"

    def finish(
        self,
        target: str,
        arms: Sequence[str],
        teachers: Mapping[str, str],
        title: str,
        started: float,
        reference: str | None = None,
        note: str = "",
    ) -> dict[str, Any]:
        """Measure everything; write summary.json, summary.png and report/. Returns what the first holds.

        Args:
            target: the model that every arm began as.
            arms: those that were trained; the last is the fused one.
            teachers: name -> folder.
            title: of picture and page.
            started: `time.monotonic()` of then.
            reference: the teacher of the target's tokenizer, whose distance is measured; None: there is none.
            note: what a reader must know besides of what was seen.
        """
        runs = {arm: [self.run_name(arm, seed) for seed in range(self.scale.seeds)] for arm in arms}
        models = {"target": [target]} | {
            arm: [str(self.folder / name / "hf") for name in names] for arm, names in runs.items()
        }
        models |= {name: [load] for name, load in teachers.items()}
        found: dict[str, Found] = {}
        answers: dict[str, str] = {}
        kinds: dict[str, dict[str, int]] = {}
        for name, loads in models.items():
            for number, load in enumerate(loads):
                one = self._measure(self.run_name(name, number), load, reference)
                kinds = kinds or {kind: {key: of[key] for key in _SIZES} for kind, of in one.items()}
                for kind, of in one.items():
                    for key in (m.key for m in MEASURES if m.key in of):
                        found.setdefault(name, {}).setdefault(kind, {}).setdefault(key, []).append(of[key])
            asked = (loads[0], self.options.prompt, self.scale.answer_tokens)
            answers[name] = self.stages.run(f"answer-{name}", asked, partial(answer, *asked), (), [_resolved(loads[0])])
        curves = {arm: _curve(self.folder / arm) for arm in arms}
        summary = {
            "title": title,
            "teachers": dict(teachers),
            "target": target,
            "layout": {"processes": self.stages.nproc, "TP": self.options.tp, "PP": self.options.pp},
            "train_tokens": {arm: curve[-1][0] for arm, curve in curves.items()},
            "seeds": self.scale.seeds,
            "bits_per_byte": {name: fmean(of[TRAINED_KIND]["bits_per_byte"]) for name, of in found.items()},
            "trained_kind": TRAINED_KIND,
            "kinds": kinds,
            "measures": found,
            "fused_folder": models[arms[-1]][0],
            "prompt": self.options.prompt,
            "answers": answers,
            "seen": f"{seen(found, TRAINED_KIND)} {note}".rstrip(),
            "seconds_this_time": round(time.monotonic() - started, 1),
        }
        write_durably(self.folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        from fusemega.report.arms_page import write_arms_page

        fixed = next((name for name, load in teachers.items() if load == reference), None)
        write_arms_page(summary, panels(summary, fixed), curves, self.folder)
        return summary

    def _measure(self, name: str, load: str, reference: str | None) -> dict[str, dict[str, Any]]:
        """Kind of text -> what is found of one model, as stage eval-`name`."""
        evaluation: dict[str, Any] = {"model": self.model(load)}
        if reference is not None and load != reference:
            evaluation["reference"] = self.model(reference)
        evaluation["data"] = {"path": str(self.held_out_file), "seq_length": SEQ_LENGTH}
        texts = {kind: str(path) for kind, path in self.texts.items()}
        self.stages.write_run_file("eval", f"eval-{name}", evaluation, nproc=1)
        stage, settings = f"eval-{name}", {"evaluation": evaluation, "texts": texts}
        one = self.stages.run(stage, settings, partial(measure, evaluation, texts), (), [_resolved(load)])
        if load == reference:  # by definition
            one = {kind: {**of, "kl": 0.0, "same_top_1": 1.0} for kind, of in one.items()}
        return dict(one)

    def _choose(self, models: Sequence[str], sources: Mapping[Path, Path]) -> dict[str, int]:
        """Of each file the first rows that fit into the budget; returns the number of tokens of each."""
        self.train_file.parent.mkdir(parents=True, exist_ok=True)
        counts = {}
        for out, source in sources.items():
            budget = self.scale.train_tokens if out == self.train_file else self.scale.measured_tokens
            chosen, tokens = [], 0
            for row, length in sorted(_lengths(models, source).items()):
                if tokens + length <= budget:
                    chosen.append(row)
                    tokens += length
            if not chosen:
                raise UserError(f"{source}: none of its rows has at most {budget} tokens")
            lines = source.read_text(encoding="utf-8").splitlines()
            write_durably(out, "".join(lines[number - 1] + "\n" for number in chosen))
            counts[out.stem] = tokens
        return counts


def _resolved(model: str) -> Path:
    from fusemega.hf.hub import resolve

    return Path(resolve(model))


def link(place: Path, model: str) -> None:
    """A model by a name inside the pipeline's folder, which run files can use."""
    from fusemega.hf.hub import resolve

    replace_link(place, resolve(model).resolve())


def parser(prog: str, description: str | None, out: str, lr: float, lambda_: float) -> argparse.ArgumentParser:
    """The command line that the quickstarts share; `out`, `lr` and `lambda_` are defaults."""
    made = argparse.ArgumentParser(
        prog=f"python -m {prog}", description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    size = made.add_mutually_exclusive_group()
    size.add_argument(
        "--smoke",
        dest="scale",
        action="store_const",
        const="smoke",
        help="two updates an arm: shows that it runs, and nothing else",
    )
    size.add_argument("--full", dest="scale", action="store_const", const="full", help="4 times the text, 3 seeds")
    made.add_argument("--train", help="JSONL of conversations to train on (default: AlpacaEval's)")
    made.add_argument("--held-out", help="JSONL of conversations to measure on")
    made.add_argument("--out", help=f"output folder (default: {out}, with the scale's name if given)")
    made.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks (1 or 3: the model has 3 KV heads)")
    made.add_argument("--pp", type=int, default=1, help="pipeline stages")
    made.add_argument(
        "--nproc", type=int, help="processes of each training (default: tp x pp); the rest is data parallel"
    )
    made.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="default fp32, faster on most CPUs")
    made.add_argument("--lr", type=float, default=lr, help=f"peak learning rate of every arm (default {lr})")
    made.add_argument(
        "--lambda",
        dest="lambda_",
        type=float,
        default=lambda_,
        help=f"weight of the labels in `fused` (default {lambda_})",
    )
    made.add_argument("--prompt", default="Why is the sky blue?", help="what every model is asked")
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
    print(table(summary))
    say(f"wrote {options.out}/summary.json, summary.png and report/report.html")


def cut(model: str, out: Path, drop: Collection[int]) -> list[int]:
    """Writes `model` without the layers `drop` as folder `out`; returns those."""
    from fusemega.hf.cut_layers import cut_layers
    from fusemega.hf.hub import resolve
    from fusemega.runtime.parallel import ParallelConfig, initialize

    cut_layers(resolve(model), out, drop, initialize(ParallelConfig()))
    return list(drop)


def _lengths(models: Sequence[str], path: Path) -> dict[int, int]:
    """Row number -> its tokens under the first model's tokenizer, of the rows that suit the tokenizers of all."""
    from fusemega.hf.hub import resolve
    from fusemega.text.data import DataConfig
    from fusemega.text.dataset import prepare
    from fusemega.text.tokenizer import Tokenizer

    common: dict[int, int] | None = None
    for model in models:
        config = DataConfig(path=str(path), seq_length=SEQ_LENGTH)
        samples = prepare(config, Tokenizer.load(resolve(model)), cache_folder() / "data", progress=True)
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
