"""Preference losses on real pairs: which of two answers does the model prefer, before and after?

    python benchmarks/preference_real.py [--pairs 300] [--seeds 1] [--arms dpo ln_dpo simpo wrpo fuse_po ...]

SmolLM2-135M-Instruct and PIQA's validation set: a task of everyday life, one answer that works and one that does not.
`--pairs` rows are trained on, `--held_out` others measured. A reward model (Bradley-Terry, from the same model) is
trained on the same pairs. For `wrpo` and `fuse_po` the target answers each prompt itself (`--samples`, at temperature
0.8 and top-p 0.95), and the reward model scores these answers and the pair's. Then a prompt has the pair from source
`author` and the samples from source `target`: `wrpo` compares the author's better one with the target's best and worst,
`fuse_po` the best and worst of each source.

Measured by transformers in fp32, apart from fusemega: the share of held-out pairs whose chosen answer has the higher
mean log-probability a token (`mean`) and the higher sum (`sum`); and after training the share whose log-probability
rose more for the chosen than for the rejected one, against the model before (`implicit`). Of the reward model, the
share with the higher score. Seeds decide the order of the data. What is finished is skipped the next time. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from seeds import spread

from fusemega.fixtures.data import preference_data, smollm2
from fusemega.pipeline.functions import stage_function
from fusemega.pipeline.run import run
from fusemega.recipes.steps import Steps

SEQ_LENGTH, BATCH, ASKED = 1024, 16, 16  # of training; texts measured at once; prompts sampled for at once
Row = dict[str, Any]
ARMS: dict[str, tuple[dict[str, Any], float]] = {  # objective, learning rate
    "dpo": ({"name": "dpo", "beta": 0.1}, 5e-6),
    "ln_dpo": ({"name": "dpo", "loss_type": "sigmoid_norm", "beta": 10.0}, 5e-6),
    "simpo": ({"name": "simpo", "beta": 10.0, "gamma_beta_ratio": 0.3}, 5e-6),
    "wrpo": ({"name": "wrpo", "beta": 0.1, "target": "target"}, 5e-6),
    "fuse_po": ({"name": "fuse_po", "beta": 0.1, "alpha": "auto"}, 5e-6),
}
OF_GROUPS, FREE = ("wrpo", "fuse_po"), ("simpo",)  # which read the groups; which need no reference


@stage_function
def split(train: str, held_out: str, pairs: int, held_out_pairs: int) -> dict[str, int]:
    """The first rows of the data set's two files."""
    data = preference_data()
    counts = {}
    for source, out, count in ((data.train, train, pairs), (data.held_out, held_out, held_out_pairs)):
        lines = source.read_text(encoding="utf-8").splitlines()[:count]
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        counts[out] = len(lines)
    return counts


@stage_function
def sample(model: str, rows: str, out: str, samples: int, new_tokens: int) -> dict[str, float]:
    """Writes for each pair a group of responses: the pair's, and those that the model samples."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    lengths, written = [], []
    lines = Path(rows).read_text(encoding="utf-8").splitlines()
    for start in range(0, len(lines), ASKED):
        part = [json.loads(line) for line in lines[start : start + ASKED]]
        torch.manual_seed(int(hashlib.sha256(lines[start].encode()).hexdigest()[:8], 16))
        prompts = [row["prompt"] for row in part]
        encoded = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            ids = network.generate(
                **encoded,
                do_sample=True,
                temperature=0.8,
                top_p=0.95,
                top_k=0,
                max_new_tokens=new_tokens,
                num_return_sequences=samples,
                pad_token_id=tokenizer.pad_token_id,
            )
        texts = tokenizer.batch_decode(ids[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
        for place, row in enumerate(part):
            own = texts[place * samples : (place + 1) * samples]
            unique = list(dict.fromkeys(text.strip() for text in own if text.strip()))
            lengths += [len(text) for text in unique]
            responses = [{"messages": row[name], "source": "author"} for name in ("chosen", "rejected")]
            responses += [{"messages": [{"role": "assistant", "content": text}], "source": "target"} for text in unique]
            written.append({"prompt": row["prompt"], "responses": responses})
    Path(out).write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")
    return {"responses": len(lengths), "characters": statistics.fmean(lengths)}


@stage_function
def measure(model: str, rows: str, out: str, before: str | None) -> dict[str, float]:
    """Shares of the held-out pairs; see the head of this file.

    Args:
        out: the file for the pairs' log-probabilities.
        before: that of the model to compare with.
    """
    sums, tokens = _log_probs(model, rows)
    Path(out).write_text(json.dumps(sums), encoding="utf-8")
    found = {
        "sum": _share(a > b for a, b in sums),
        "mean": _share(a / m > b / n for (a, b), (m, n) in zip(sums, tokens, strict=True)),
        "pairs": float(len(sums)),
        "logp_chosen": statistics.fmean(a for a, _ in sums),
    }
    if before is not None:
        old = json.loads(Path(before).read_text(encoding="utf-8"))
        found["implicit"] = _share(a - c > b - d for (a, b), (c, d) in zip(sums, old, strict=True))
    return found


@stage_function
def measure_rewards(model: str, rows: str) -> dict[str, float]:
    """The share of the held-out pairs whose chosen answer has the higher score."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    network = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = []
    for row in map(json.loads, Path(rows).read_text(encoding="utf-8").splitlines()):
        for name in ("chosen", "rejected"):
            texts.append(tokenizer.apply_chat_template(row["prompt"] + row[name], return_dict=True)["input_ids"])
    found = []
    for ids in texts:  # one by one: where a padded text ends, this class decides by the id of its last token
        with torch.inference_mode():
            found.append(float(network(torch.tensor([ids])).logits[0, 0]))
    scores = list(zip(found[::2], found[1::2], strict=True))
    return {"accuracy": _share(a > b for a, b in scores), "margin": statistics.fmean(a - b for a, b in scores)}


def _log_probs(model: str, rows: str) -> tuple[list[list[float]], list[list[int]]]:
    """Of each pair [chosen, rejected]: summed log-probabilities of the answer's tokens, and how many they are."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    answers: list[tuple[list[int], int]] = []  # token ids to the answer's closing token, and where the answer begins
    for row in map(json.loads, Path(rows).read_text(encoding="utf-8").splitlines()):
        asked = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        for name in ("chosen", "rejected"):
            ids = tokenizer.apply_chat_template(row["prompt"] + row[name], return_dict=True)["input_ids"]
            assert ids[: len(asked)] == asked
            closing = len(ids) - 1 - ids[::-1].index(tokenizer.eos_token_id)  # behind it the template has a line break
            answers.append((ids[: closing + 1], len(asked)))
    sums = [0.0] * len(answers)
    order = sorted(range(len(answers)), key=lambda place: len(answers[place][0]))
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        longest = max(len(answers[place][0]) for place in places)
        # Padding lies behind the text, where causal attention does not see it.
        ids = torch.tensor([answers[place][0] + [0] * (longest - len(answers[place][0])) for place in places])
        with torch.inference_mode():
            logits = network(ids).logits
        for of_text, place in zip(logits, places, strict=True):
            text, begins = answers[place]
            logp = of_text[begins - 1 : len(text) - 1].double().log_softmax(-1)
            sums[place] = float(logp.gather(1, torch.tensor(text[begins:])[:, None]).sum())
    lengths = [len(text) - begins for text, begins in answers]
    return (
        [list(pair) for pair in zip(sums[::2], sums[1::2], strict=True)],
        [list(pair) for pair in zip(lengths[::2], lengths[1::2], strict=True)],
    )


def _share(values: Any) -> float:
    return round(statistics.fmean(float(value) for value in values), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--held_out", type=int, default=150)
    parser.add_argument("--passes", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--lr", type=float, help="in place of each arm's own")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="fusemega-preference-real-"))
    steps, model = Steps(work, args.nproc, {}, {"dtype": args.dtype}), str(smollm2())
    train, held_out = str(work / "data" / "train.jsonl"), str(work / "data" / "held_out.jsonl")
    settings = {"train": train, "held_out": held_out, "pairs": args.pairs, "held_out_pairs": args.held_out}
    steps.call("split", split, settings, {}, outputs={"train": train, "held_out": held_out})
    pairs = {"path": train, "seq_length": SEQ_LENGTH}
    of_pairs = steps.teach("pairs", model, pairs, rows="none")
    length = {"train_epochs": args.passes, "global_batch_size": 16, "save_interval": 1000, "keep_checkpoints": 1}
    length |= {"share_prefix": True}  # less to compute, and the same loss
    shape = {"lr_warmup_fraction": 0.1, "adam_beta2": 0.95}
    rewarding = steps.train("reward", model, pairs, {"name": "reward"}, {"lr": args.lr or 1e-5, **shape}, length)
    steps.call("measure-reward", measure_rewards, {"model": rewarding, "rows": held_out}, {"model": rewarding},
               {"rows": held_out})  # fmt: skip
    groups = of_groups = ""
    if set(args.arms) & set(OF_GROUPS):
        sampled = str(work / "data" / "sampled.jsonl")
        settings = {"model": model, "rows": train, "out": sampled, "samples": args.samples, "new_tokens": 48}
        steps.call("sample", sample, settings, {"model": model}, {"rows": train}, {"out": sampled})
        groups = steps.score("sampled", rewarding, {"path": sampled, "seq_length": SEQ_LENGTH})
        of_groups = steps.teach("groups", model, {"path": groups, "seq_length": SEQ_LENGTH}, rows="none")
    models: dict[str, list[str]] = {"before": [model]}
    for arm in args.arms:
        objective, lr = ARMS[arm]
        if arm not in FREE:
            objective = objective | {"reference": {"store": of_groups if arm in OF_GROUPS else of_pairs}}
        data = {"path": groups, "seq_length": SEQ_LENGTH, "on_bad_row": "skip"} if arm in OF_GROUPS else pairs
        models[arm] = [
            steps.train(f"{arm}-{s}", model, data, objective, {"lr": args.lr or lr, **shape}, length | {"seed": s})
            for s in range(args.seeds)
        ]
    before = str(work / "before-0.json")
    for arm, folders in models.items():
        for number, folder in enumerate(folders):
            out = str(work / f"{arm}-{number}.json")
            read = {"rows": held_out} | ({} if arm == "before" else {"before": before})
            settings = {"model": folder, "rows": held_out, "out": out, "before": read.get("before")}
            steps.call(f"measure-{arm}-{number}", measure, settings, {"model": folder}, read, {"out": out})
    results = run(steps.graph()).results
    found: dict[str, Any] = {"reward": results["measure-reward"]}
    if "sample" in results:
        found["sampled"] = results["sample"]
    for arm, folders in models.items():
        of_seeds = [results[f"measure-{arm}-{number}"] for number in range(len(folders))]
        found[arm] = {name: spread([each[name] for each in of_seeds]) for name in of_seeds[0]}
        print(arm, json.dumps(found[arm]), flush=True)
    names = ("pairs", "held_out", "passes", "seeds", "samples", "lr", "dtype")
    print(json.dumps({"benchmark": "preference_real", **{n: getattr(args, n) for n in names}, "measures": found}))


if __name__ == "__main__":
    main()
