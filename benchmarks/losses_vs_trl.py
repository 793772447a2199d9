"""Preference losses beside TRL's: the same weights, reference and tokens; equal losses and gradient norms?

    python benchmarks/losses_vs_trl.py [--pairs 4]

A tiny random Llama, a second one as its reference, and pairs of PIQA. Each case is one step of what `fusemega train`
runs, in fp32; beside it is the released trainer of TRL (`TRL` below, installed without its dependencies): DPOTrainer,
RewardTrainer, and CPOTrainer (SimPO) and ORPOTrainer of `trl.experimental`. They get fusemega's tokens, one pair in a
micro-batch, so that a mean over the tokens of a micro-batch is one of a response. TRL's ORPO teaches the prompt too, so
its prompts are one token long, which nothing predicts. The last line is one JSON object; `ok` says whether all losses
and norms are within 1e-5 of TRL's, relative to the norm or the loss, or to 1 where the loss is smaller.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preference_vs_trl import TRL, environment
from tiny import write_chat, write_model

TOLERANCE = 1e-5
PADDING = 508  # the last token of the tiny model's vocabulary, which no row has


@dataclass(frozen=True)
class Case:
    """One loss: its section of a run file, TRL's trainer, and that one's settings."""

    objective: dict[str, Any]
    trainer: str
    settings: dict[str, Any] = field(default_factory=dict)
    one_token_prompt: bool = False
    margins: bool = False


def _dpo(loss_type: str, beta: float, **options: Any) -> Case:
    """The same words on both sides."""
    return Case(
        {"name": "dpo", "loss_type": loss_type, "beta": beta, **options},
        "DPOTrainer",
        {"loss_type": [loss_type], "beta": beta, **options},
    )


CASES = {
    "dpo sigmoid": _dpo("sigmoid", 0.1),
    "dpo sigmoid_norm": _dpo("sigmoid_norm", 10.0),
    "dpo hinge": _dpo("hinge", 0.05),
    "dpo ipo": _dpo("ipo", 0.5),
    "dpo sigmoid, ld_alpha": _dpo("sigmoid", 0.1, ld_alpha=0.3),
    "dpo sigmoid, rpo_alpha": Case(
        {"name": "dpo", "beta": 0.1, "rpo_alpha": 0.7},
        "DPOTrainer",
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7], "beta": 0.1},
    ),
    "simpo": Case(
        {"name": "simpo", "beta": 2.0, "gamma_beta_ratio": 0.3},
        "CPOTrainer",
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.6, "cpo_alpha": 0.0},
    ),
    "orpo": Case({"name": "orpo", "beta": 0.4}, "ORPOTrainer", {"beta": 0.4}, one_token_prompt=True),
    "reward": Case({"name": "reward"}, "RewardTrainer"),
    "reward, margin and centre": Case(
        {"name": "reward", "margin": "rows", "center_rewards_coefficient": 0.3},
        "RewardTrainer",
        {"center_rewards_coefficient": 0.3},
        margins=True,
    ),
}


def write_inputs(work: Path, pairs: int) -> None:
    """Both models, a reward model, and the rows of each kind.

    The token of padding is one of no text: transformers gives its embedding no gradient, and a reward model takes the
    score of the last token that is another.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from fusemega.fixtures.data import preference_data

    chat = write_chat(work / "chat.jsonl", 200, 300)
    for number, name in enumerate(("policy", "reference")):
        write_model(work / name, chat, seed=number, pad_token_id=PADDING)
    torch.manual_seed(2)
    model = AutoModelForSequenceClassification.from_pretrained(work / "policy", num_labels=1)
    model.save_pretrained(work / "scorer")
    AutoTokenizer.from_pretrained(work / "policy").save_pretrained(work / "scorer")
    rows = [json.loads(line) for line in preference_data().train.read_text(encoding="utf-8").splitlines()[:pairs]]
    short = [
        {"prompt": "a", **{name: " " + row[name][0]["content"] for name in ("chosen", "rejected")}} for row in rows
    ]
    kinds = {
        "chat": rows,
        "margins": [row | {"margin": 0.25 * n} for n, row in enumerate(rows)],
        "one_token_prompt": short,
    }
    for kind, kept in kinds.items():
        (work / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def kind_of(case: Case) -> str:
    return "one_token_prompt" if case.one_token_prompt else "margins" if case.margins else "chat"


def fusemega_side(work: Path, pairs: int, name: str) -> dict[str, Any]:
    """Loss and gradient norm of one step, and the tokens of its samples."""
    from fusemega.config import validate
    from fusemega.training.assembly import open_trainer
    from fusemega.training.run_file import TrainRun

    case = CASES[name]
    objective = dict(case.objective)
    if case.trainer == "DPOTrainer":
        objective["reference"] = {"in_job": {"load": str(work / "reference"), "dtype": "fp32"}, "same_model": False}
    settings = {
        "output_dir": str(work / name),
        "model": {"load": str(work / ("scorer" if case.trainer == "RewardTrainer" else "policy")), "dtype": "fp32"},
        "data": {"path": str(work / f"{kind_of(case)}.jsonl"), "seq_length": 512},
        "objective": objective,
        "optimizer": {"lr": 1e-6},
        "training": {"train_iters": 1, "global_batch_size": pairs, "export_hf": False},
    }
    trainer, _ = open_trainer(validate(TrainRun, settings, name))
    data = trainer.data.dataset
    samples = [[data[i] for i in data.unit(unit)] for unit in range(data.num_units)]
    assert not any(PADDING in s.ids for pair in samples for s in pair)
    tokens = [[{"ids": s.ids.tolist(), "supervised": s.supervised.tolist()} for s in pair] for pair in samples]
    taken = trainer.step()
    return {"loss": taken.get("loss", taken[f"{objective['name']} loss"]), "norm": taken["grad-norm"], "pairs": tokens}


def trl_side(work: Path, name: str, pairs: list[Any]) -> dict[str, float]:
    """The same by TRL, whose trainer is made as its users make it; its loss is asked for one pair at a time."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    case = CASES[name]
    kinds = {
        "DPOTrainer": (trl.DPOConfig, trl.DPOTrainer),
        "RewardTrainer": (trl.RewardConfig, trl.RewardTrainer),
        "CPOTrainer": (CPOConfig, CPOTrainer),
        "ORPOTrainer": (ORPOConfig, ORPOTrainer),
    }
    config, kind = kinds[case.trainer]
    same = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False}
    loader = AutoModelForSequenceClassification if case.trainer == "RewardTrainer" else AutoModelForCausalLM
    folder = work / ("scorer" if case.trainer == "RewardTrainer" else "policy")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(PADDING)
    own: dict[str, Any] = {}
    if case.trainer == "DPOTrainer":
        own["ref_model"] = AutoModelForCausalLM.from_pretrained(work / "reference", dtype=torch.float32)
    trainer = kind(
        loader.from_pretrained(folder, dtype=torch.float32),
        args=config(output_dir=str(work / "trl"), **same, **case.settings),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}]),
        processing_class=tokenizer,
        **own,
    )
    total = 0.0
    rows = [json.loads(line) for line in (work / f"{kind_of(case)}.jsonl").read_text(encoding="utf-8").splitlines()]
    for row, pair in zip(rows, pairs, strict=True):
        ids, mask, completion = (padded(pair, key) for key in ("ids", None, "supervised"))
        if case.trainer in ("DPOTrainer", "RewardTrainer"):
            inputs = {"input_ids": ids, "attention_mask": mask}
            if case.trainer == "DPOTrainer":
                inputs["completion_mask"] = completion
            if case.margins:
                inputs["margin"] = torch.tensor([row["margin"]])
            loss = trainer.compute_loss(trainer.model, inputs)
        else:
            inputs = {}
            for place, side in enumerate(("chosen", "rejected")):
                inputs[f"{side}_input_ids"] = ids[place : place + 1]
                inputs[f"{side}_attention_mask"] = mask[place : place + 1]
                inputs[f"{side}_labels"] = ids[place : place + 1].masked_fill(completion[place : place + 1] == 0, -100)
            loss, _ = trainer.get_batch_loss_metrics(trainer.model, inputs)
        (loss / len(pairs)).backward()
        total += loss.item() / len(pairs)
    norms = [p.grad.double().norm() for p in trainer.model.parameters() if p.grad is not None]
    return {"loss": total, "norm": float(torch.stack(norms).norm())}


def padded(pair: list[dict[str, Any]], key: str | None) -> Any:
    """[2, longest]: one field of both responses, or 1 where there is a token."""
    import torch

    filler = PADDING if key == "ids" else 0
    found = torch.full((2, max(len(each["ids"]) for each in pair)), filler)
    for place, each in enumerate(pair):
        values = torch.ones(len(each["ids"])) if key is None else torch.tensor(each[key])
        found[place, : len(each["ids"])] = values.long()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        kind, work, name = args.side
        out = Path(work) / f"{kind}.json"
        if kind == "fusemega":
            found: Any = fusemega_side(Path(work), args.pairs, name)
        else:
            found = trl_side(Path(work), name, json.loads((Path(work) / "fusemega.json").read_text())["pairs"])
        out.write_text(json.dumps(found))
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_inputs(work, args.pairs)
        for name in args.cases:
            both = {}
            for kind in ("fusemega", "trl"):
                command = [sys.executable, __file__, "--pairs", str(args.pairs), "--side", kind, str(work), name]
                ran = subprocess.run(
                    command, env=os.environ | environment(), capture_output=True, text=True, check=False
                )
                if ran.returncode:
                    raise SystemExit(f"{kind}, {name}: status {ran.returncode}\n{ran.stderr[-3000:]}")
                both[kind] = json.loads((work / f"{kind}.json").read_text())
            ours, theirs = both["fusemega"], both["trl"]
            results[name] = {
                "loss": [ours["loss"], theirs["loss"]],
                "norm": [ours["norm"], theirs["norm"]],
                "loss_error": abs(ours["loss"] - theirs["loss"]) / max(1.0, abs(theirs["loss"])),
                "norm_error": abs(ours["norm"] - theirs["norm"]) / theirs["norm"],
            }
            print(name, json.dumps(results[name]), flush=True)
    worst = {key: max(each[key] for each in results.values()) for key in ("loss_error", "norm_error")}
    ok = all(value < TOLERANCE for value in worst.values())
    print(json.dumps({"benchmark": "losses_vs_trl", "trl": TRL, "cases": results, **worst, "ok": ok}))
    sys.exit(not ok)


if __name__ == "__main__":
    main()
