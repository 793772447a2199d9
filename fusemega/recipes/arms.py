"""What the quickstarts share: copies ("arms") of one target trained on the same tokens, then measured side by side."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fusemega.errors import UserError
from fusemega.files.output import write_durably
from fusemega.files.owned import replace_link
from fusemega.fixtures import data as assets
from fusemega.fixtures.data import DOMAINS
from fusemega.pipeline.run import Outcome, run_then
from fusemega.prune.order import read_order
from fusemega.recipes.measures import MEASURES, Found, answer, measure, panels, seen, table
from fusemega.recipes.prepare import choose_rows
from fusemega.recipes.prune_steps import PruneSteps
from fusemega.runtime.console import say
from fusemega.training.records import read_metrics

SEQ_LENGTH = 512
TOP_K = 10
TRAINED_KIND = "chat"  # the others are kinds that no arm is trained on
SEED = 1234
_SIZES = ("samples", "tokens", "bytes")
_ITSELF = {"kl": 0.0, "same_top_1": 1.0}  # a model compared with itself
# Blocks that leave SmolLM2-135M-Instruct, found by `fusemega prune search` with the settings in the file. A model that
# lost a third of its layers babbles, and neither run can recover from that in minutes.
ORDER = Path(__file__).with_name("smollm2_order.json")


@dataclass(frozen=True)
class Scale:
    """The sizes of a quickstart.

    Attributes:
        train_tokens: number of tokens to train on, in each pass.
        measured_tokens: number of tokens to measure on, for each kind of text.
        passes: passes over the training tokens. Labels alone overfit after a few; a teacher's rows much later.
        train_iters: number of updates that cuts a run short; None: no limit.
        seeds: how often each arm is trained; a seed decides the order of the data.
        answer_tokens: length of each model's answer to the prompt.
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
    """A quickstart's stages, its data and the settings that all arms have in common.

    Args:
        options: of the command line, from `parser`.
        scale: the sizes.
    """

    def __init__(self, options: argparse.Namespace, scale: Scale) -> None:
        self.options, self.scale, self.folder = options, scale, Path(options.out)
        parallel = {"tensor_model_parallel_size": options.tp, "pipeline_model_parallel_size": options.pp}
        nproc = options.nproc or options.tp * options.pp
        self.steps = PruneSteps(self.folder, nproc, parallel, {"dtype": options.dtype})
        self.texts = {kind: str(self.folder / "data" / f"{kind}.jsonl") for kind in ("train", "held_out", *DOMAINS)}
        self.rows = {"path": self.texts["train"], "seq_length": SEQ_LENGTH}

    def choose_data(self, models: Sequence[str]) -> None:
        """Adds stage data, which chooses the text to train and to measure on, to suit the tokenizers of all `models`.

        Tokens are counted with the first model's tokenizer. With several tokenizers, conversations longer than a window
        of one of them are left out: tokenizers cut windows at different bytes, which gives no common samples.
        """
        options, scale = self.options, self.scale
        if (options.train is None) != (options.held_out is None):
            raise UserError("--train and --held-out: give both or neither")
        train, held_out = assets.chat_data() if options.train is None else (Path(options.train), Path(options.held_out))
        sources = {"train": train, "held_out": held_out}
        sources |= {kind: assets.domain_data(kind).held_out for kind in DOMAINS}
        files = [
            {
                "source": str(source),
                "out": self.texts[kind],
                "tokens": scale.train_tokens if kind == "train" else scale.measured_tokens,
            }
            for kind, source in sources.items()
        ]
        settings = {"models": list(models), "files": files, "seq_length": SEQ_LENGTH}
        read = {f"models.{number}": model for number, model in enumerate(models)}
        inputs = {kind: str(path) for kind, path in sources.items()}
        self.steps.call("data", choose_rows, settings, read, inputs, self.texts)

    def prune(self, model: str, out: Path, order: Path = ORDER) -> str:
        """Adds stage prune-apply, which writes `model` without the blocks of `order` as folder `out`. Returns `out`."""
        return self.steps.prune_apply(model, str(order), len(read_order(order)), "plain", str(out))

    def teach(self, name: str, teacher: str) -> str:
        """Adds stage teach-`name`, which stores a teacher's rows of the training data. Returns the store's folder."""
        return self.steps.teach(name, teacher, self.rows, top_k=TOP_K)

    def teach_measured(self, name: str, teacher: str) -> str:
        """Adds stage teach-`name`, which stores a teacher's rows of all text that models are measured on."""
        texts = {"path": list(self._measured().values()), "seq_length": SEQ_LENGTH}
        return self.steps.teach(name, teacher, texts, top_k=TOP_K)

    def train(self, target: str, objectives: Mapping[str, Mapping[str, Any]]) -> None:
        """Adds a stage for each objective and seed, which trains a copy of `target` on the same tokens."""
        scale = self.scale
        length = {"train_iters": scale.train_iters} if scale.train_iters else {"train_epochs": float(scale.passes)}
        kept = {"save_interval": 25, "keep_checkpoints": 1}  # 1.4 GB each
        optimizer = {"lr": self.options.lr, "lr_warmup_fraction": 0.1, "adam_beta2": 0.95}
        for arm, objective in objectives.items():
            for seed in range(scale.seeds):
                training = {"global_batch_size": scale.global_batch_size, "seed": SEED + seed, **length, **kept}
                self.steps.train(self.run_name(arm, seed), target, self.rows, objective, optimizer, training)

    def run_name(self, arm: str, seed: int) -> str:
        """The name of an arm's run with seed number `seed` (from 0); the first has the arm's own name."""
        return arm if seed == 0 else f"{arm}-{seed + 1}"

    def finish(
        self,
        target: str,
        arms: Sequence[str],
        teachers: Mapping[str, str],
        title: str,
        started: float,
        reference: str | None = None,
        rows: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Run the stages and measure; write summary.json, summary.png and report/. Returns what the first holds.

        Args:
            target: the model from which every arm started.
            arms: names of the trained arms; the last is the fused one.
            teachers: name -> folder.
            title: title of picture and page.
            started: `time.monotonic()` when the command began.
            reference: the teacher to which distances are measured; None: there is none.
            rows: the reference's store of the measured text, and the map to the target's tokenizer, if it has another.
                None: it has the target's, and runs beside each model.
        """
        runs = {arm: [self.run_name(arm, seed) for seed in range(self.scale.seeds)] for arm in arms}
        models = {"target": [target]} | {
            arm: [str(self.folder / name / "hf") for name in names] for arm, names in runs.items()
        }
        models |= {name: [load] for name, load in teachers.items()}
        for name, loads in models.items():
            for number, load in enumerate(loads):
                compared = reference if rows is None or name not in teachers else None
                self._measure(self.run_name(name, number), load, compared, rows)
            asked = {"folder": loads[0], "prompt": self.options.prompt, "tokens": self.scale.answer_tokens}
            self.steps.call(f"answer-{name}", answer, asked, {"model": loads[0]})

        def summary(outcome: Outcome) -> dict[str, Any]:
            return self._summary(models, arms, teachers, outcome.results, title, started, reference)

        return run_then(self.steps.graph(), summary)

    def _summary(
        self,
        models: Mapping[str, Sequence[str]],
        arms: Sequence[str],
        teachers: Mapping[str, str],
        results: Mapping[str, Any],
        title: str,
        started: float,
        reference: str | None,
    ) -> dict[str, Any]:
        """See `finish`; `results` are the stages'."""
        found: dict[str, Found] = {}
        kinds: dict[str, dict[str, int]] = {}
        for name, loads in models.items():
            for number, load in enumerate(loads):
                one = results[f"eval-{self.run_name(name, number)}"]
                if load == reference:  # its distance from itself is not measured
                    asked = results["eval-target"][TRAINED_KIND].keys()
                    itself = {key: value for key, value in _ITSELF.items() if key in asked}
                    one = {kind: of | itself for kind, of in one.items()}
                kinds = kinds or {kind: {key: of[key] for key in _SIZES} for kind, of in one.items()}
                for kind, of in one.items():
                    for key in (m.key for m in MEASURES if m.key in of):
                        found.setdefault(name, {}).setdefault(kind, {}).setdefault(key, []).append(of[key])
        curves = {arm: _curve(self.folder / arm) for arm in arms}
        iterations = self.scale.train_iters
        too_few = "" if iterations is None else f"This was {iterations} updates: too few to tell which is better."
        summary = {
            "title": title,
            "teachers": dict(teachers),
            "target": models["target"][0],
            "layout": {"processes": self.steps.nproc, "TP": self.options.tp, "PP": self.options.pp},
            "train_tokens": {arm: curve[-1][0] for arm, curve in curves.items()},
            "seeds": self.scale.seeds,
            "bits_per_byte": {name: fmean(of[TRAINED_KIND]["bits_per_byte"]) for name, of in found.items()},
            "trained_kind": TRAINED_KIND,
            "kinds": kinds,
            "measures": found,
            "fused_folder": models[arms[-1]][0],
            "prompt": self.options.prompt,
            "answers": {name: results[f"answer-{name}"] for name in models},
            "seen": " ".join(filter(None, (seen(found, TRAINED_KIND), too_few))),
            "seconds_this_time": round(time.monotonic() - started, 1),
        }
        write_durably(self.folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        from fusemega.report.arms_page import write_arms_page

        fixed = next((name for name, load in teachers.items() if load == reference), None)
        write_arms_page(summary, panels(summary, fixed), curves, self.folder)
        return summary

    def _measured(self) -> dict[str, str]:
        """Kind -> the text of it that models are measured on."""
        return {TRAINED_KIND: self.texts["held_out"]} | {kind: self.texts[kind] for kind in DOMAINS}

    def _measure(self, name: str, load: str, reference: str | None, rows: Mapping[str, str] | None) -> None:
        """Adds stage eval-`name`, which measures one model on each kind of text; `reference`, `rows`: see `finish`."""
        model, run_file = {"dtype": self.options.dtype}, str(self.folder / f"eval-{name}.yaml")
        evaluation: dict[str, Any] = {"model": {"load": load, **model}}
        read, stored = {"model": load}, {}
        if reference is not None and rows is not None:
            evaluation["teacher"] = dict(rows)
            stored = {f"teacher.{key}": path for key, path in rows.items()}
        elif reference is not None and load != reference:
            evaluation["reference"] = {"load": reference, **model}
            read["reference"] = reference
        evaluation["data"] = {"path": self.texts["held_out"], "seq_length": SEQ_LENGTH}
        texts = self._measured()
        settings = {"evaluation": evaluation, "texts": texts, "run_file": run_file}
        self.steps.call(f"eval-{name}", measure, settings, read, texts | stored, run_file=run_file)


def link(place: Path, model: str) -> None:
    """Makes `place`, a name inside the pipeline's folder for run files to use, a link to a model."""
    from fusemega.hf.hub import resolve

    replace_link(place, resolve(model).resolve())


def _positive(text: str) -> int:
    """A number of processes. argparse says what is wrong with another, and ends with status 2."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def parser(prog: str, description: str | None, out: str, lr: float, lambda_: float) -> argparse.ArgumentParser:
    """The command line that the quickstarts share; `out`, `lr` and `lambda_` are defaults."""
    made = argparse.ArgumentParser(
        prog=f"python -m {prog}",
        description=description,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
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
    made.add_argument(
        "--tp", type=_positive, default=1, help="tensor-parallel ranks (1 or 3: the model has 3 KV heads)"
    )
    made.add_argument("--pp", type=_positive, default=1, help="pipeline stages")
    made.add_argument(
        "--nproc", type=_positive, help="processes of each training (default: tp x pp); the rest is data parallel"
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


def run_quickstart(
    parser: argparse.ArgumentParser,
    pipeline: Callable[[argparse.Namespace, Scale], dict[str, Any]],
) -> None:
    """Parses the command line, runs the pipeline, and prints the result."""
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


def _curve(output: Path) -> list[tuple[float, float]]:
    """(tokens trained on so far, cross-entropy on labels) of each update."""
    points, tokens = [], 0.0
    for row in read_metrics(output):
        tokens += row["tokens"]
        points.append((tokens, row["lm loss"]))
    return points
