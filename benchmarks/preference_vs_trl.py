"""DPO beside TRL: the same pairs, weights and dtype; pairs a second, peak memory, and equal losses.

    python benchmarks/preference_vs_trl.py [--rows chat prompt25 prompt50 prompt75] [--pairs 4] [--steps 5]

SmolLM2-135M-Instruct on this machine's CPU, one process a side, two at a time. `chat` are real conversations: the
rejected answer is the one to another question. `promptN` are rows in which the prompt has N % of the tokens of prompt
and response. Peers are TRL's released DPOTrainer as it comes (a second model is the reference) and with precomputed
reference log-probs, `TRL` below, installed without its dependencies, which this environment has. Its gradient
checkpointing is off, because fusemega's recomputation is off too. fusemega runs what `fusemega train` runs, with the
reference in a store; `shared` is the same with `training.share_prefix`. Computing the reference's log-probs beforehand
is not timed on any side. Both sides of a race take the same steps from the same weights, in turn, so each step gives
one ratio of two times that lie close together; figures are medians over the steps behind the first (of speed-ups also
the lowest and the highest), of the clock and of the processor's time: with `--threads 1`, what else the machine does
hardly moves the latter. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from in_turn import Requests, Side, peak_mib

TRL = "trl==1.16.0"
PER_DEVICE, ROW = 2, 2048  # pairs of TRL's micro-batch; tokens of fusemega's rows
BETA, LEARNING_RATE, SEED = 0.1, 1e-6, 1234
SIDES = ("fusemega", "shared", "trl", "trl_precomputed")
RACES = (("fusemega", "trl"), ("fusemega", "trl_precomputed"), ("shared", "trl_precomputed"))
KINDS = ("chat", "prompt25", "prompt50", "prompt75")
TOKENS = 512  # of prompt and response together, in `promptN`


@dataclass(frozen=True)
class Race:
    """What both sides of a race have in common."""

    work: Path
    dtype: str
    steps: int
    pairs: int  # of an update


def write_pairs(kind: str, race: Race) -> None:
    """Rows of prompt, chosen and rejected: `pairs.jsonl`, and for TRL in the order in which fusemega takes them."""
    from fusemega.fixtures.data import chat_data, smollm2
    from fusemega.text.order import sample_ids
    from fusemega.text.tokenizer import Tokenizer

    count, tokenizer = race.pairs * race.steps, Tokenizer.load(smollm2())
    chats = [json.loads(line)["messages"] for line in chat_data().train.read_text(encoding="utf-8").splitlines()]
    rows: list[dict[str, Any]] = []
    if kind == "chat":
        for (asked, chosen), (_, rejected) in zip(chats, chats[1:], strict=False):
            if max(len(tokenizer.encode([one["content"]])[0].ids) for one in (chosen, rejected)) < ROW // 3:
                rows.append({"prompt": [asked], "chosen": [chosen], "rejected": [rejected]})
    else:
        text = "\n".join(answer["content"] for _, answer in chats)
        encoding = tokenizer.encode([text[: 40 * TOKENS * count]])[0]
        prompt = TOKENS * int(kind.removeprefix("prompt")) // 100
        response, at = TOKENS - prompt, 0
        while len(rows) < count:
            row: dict[str, Any] = {}
            for name, length in (("prompt", prompt), ("chosen", response), ("rejected", response)):
                content = text[int(encoding.starts[at]) : int(encoding.ends[at + length - 1])]
                row[name] = [{"role": "user" if name == "prompt" else "assistant", "content": content}]
                at += length
            rows.append(row)
    lines = [json.dumps(row) + "\n" for row in rows[:count]]
    order = [unit for step in range(race.steps) for unit in sample_ids(step, race.pairs, count, SEED)]
    (race.work / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    (race.work / "in_order.jsonl").write_text("".join(lines[unit] for unit in order), encoding="utf-8")


def run_file(race: Race, name: str) -> Any:
    """The run file of fusemega's side."""
    from fusemega.config import validate
    from fusemega.fixtures.data import smollm2
    from fusemega.training.run_file import TrainRun

    training = {"train_iters": race.steps, "global_batch_size": race.pairs, "seed": SEED, "export_hf": False}
    settings = {
        "output_dir": str(race.work / f"run-{name}"),
        "model": {"load": str(smollm2()), "dtype": race.dtype},
        "data": {"path": str(race.work / "pairs.jsonl"), "seq_length": ROW},
        "objective": {"name": "dpo", "beta": BETA, "reference": {"store": str(race.work / "reference")}},
        "optimizer": {"lr": LEARNING_RATE, "lr_decay_style": "constant", "clip_grad": 1.0},
        "training": training | ({"share_prefix": True} if name == "shared" else {}),
    }
    return validate(TrainRun, settings, name)


def write_reference(work: Path, dtype: str) -> None:
    """The reference's log-probabilities, by `fusemega teach`."""
    from fusemega.config import validate
    from fusemega.fixtures.data import smollm2
    from fusemega.scoring.teach import TeachRun, teach

    settings = {
        "model": {"load": str(smollm2()), "dtype": dtype},
        "data": {"path": str(work / "pairs.jsonl"), "seq_length": ROW},
        "store": str(work / "reference"),
        "rows": "none",
    }
    teach(validate(TeachRun, settings, "teach"))


def fusemega_side(requests: Requests, race: Race, name: str) -> None:
    from fusemega.training.assembly import open_trainer

    trainer, _ = open_trainer(run_file(race, name))
    requests.serve(lambda _: trainer.step()["dpo loss"])


def trl_side(requests: Requests, race: Race, name: str) -> None:
    """TRL's own loop, which waits for a request before each step: only the step itself is timed."""
    import torch
    from datasets import load_dataset
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from fusemega.fixtures.data import smollm2

    class Turns(TrainerCallback):
        started = used = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if requests.next() is None:
                os._exit(0)
            self.started, self.used = time.perf_counter(), time.process_time()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                requests.answer({**self.took, "loss": float(logs["loss"]), "peak_mib": peak_mib()})

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.took = {
                "seconds": time.perf_counter() - self.started,
                "cpu_seconds": time.process_time() - self.used,
            }

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset)

    config = DPOConfig(
        output_dir=str(race.work / name),
        max_steps=race.steps,
        per_device_train_batch_size=PER_DEVICE,
        gradient_accumulation_steps=race.pairs // PER_DEVICE,
        gradient_checkpointing=False,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        beta=BETA,
        max_length=ROW,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        precompute_ref_log_probs=name == "trl_precomputed",
        model_init_kwargs={"dtype": {"fp32": torch.float32, "bf16": torch.bfloat16}[race.dtype]},
    )
    rows = load_dataset(
        "json", data_files=str(race.work / "in_order.jsonl"), split="train", cache_dir=str(race.work / "datasets")
    )
    trainer = InOrder(str(smollm2()), args=config, train_dataset=rows, callbacks=[Turns()])
    requests.ready()
    trainer.train()


def run_race(race: Race, names: tuple[str, str], threads: int) -> dict[str, Any]:
    """Both sides through the same steps, in turn."""
    script = str(Path(__file__).resolve())
    arguments = (str(race.work), race.dtype, str(race.steps), str(race.pairs))
    sides = {
        name: Side([script, "--side", name, *arguments], race.work / f"{name}.log", environment()) for name in names
    }
    taken = []
    try:
        for side in sides.values():
            side.answer()
        for number in range(race.steps):
            order = names if number % 2 else names[::-1]
            taken.append({name: sides[name].step(number, threads) for name in order})
            rates = (f"{name} {race.pairs / taken[-1][name]['seconds']:.2f}" for name in names)
            print("  ".join(rates), "pairs/s", flush=True)
    finally:
        for side in sides.values():
            side.close()
    first, second = names
    ratios = {
        unit: [found[second][unit] / found[first][unit] for found in taken[1:]] for unit in ("seconds", "cpu_seconds")
    }
    return {
        "sides": names,
        "pairs_per_s": {n: round(race.pairs / statistics.median(f[n]["seconds"] for f in taken[1:]), 3) for n in names},
        "speedup": {
            unit: [round(f(of_unit), 3) for f in (statistics.median, min, max)] for unit, of_unit in ratios.items()
        },
        "losses": {name: [round(found[name]["loss"], 5) for found in taken] for name in names},
        "peak_mib": {name: round(taken[-1][name]["peak_mib"]) for name in names},
    }


def environment() -> dict[str, str]:
    """TRL on the path, installed once into the cache of this project."""
    from fusemega.files.cache import cache_folder

    folder = cache_folder() / "benchmarks" / TRL
    if not (folder / "trl").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), TRL]
        subprocess.run(pip, check=True)
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH"), str(folder)]))
    return {"PYTHONPATH": path, "TRL_EXPERIMENTAL_SILENCE": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--races", nargs="+", type=int, choices=range(len(RACES)), default=list(range(len(RACES))))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=4, help="of an update")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--side", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        name, work, dtype, steps, pairs = args.side
        side = trl_side if name.startswith("trl") else fusemega_side
        side(Requests(), Race(Path(work), dtype, int(steps), int(pairs)), name)
        return
    found: dict[str, Any] = {}
    for kind in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            race = Race(Path(folder), args.dtype, args.steps, args.pairs)
            write_pairs(kind, race)
            write_reference(race.work, race.dtype)
            for number in args.races:
                result = run_race(race, RACES[number], args.threads)
                found[f"{kind}: {' / '.join(RACES[number])}"] = result
                print(kind, json.dumps(result), flush=True)
    print(json.dumps({"benchmark": "preference_vs_trl", "trl": TRL, "dtype": args.dtype, "races": found}))


if __name__ == "__main__":
    main()
