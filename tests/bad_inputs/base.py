"""A folder in which every command succeeds: what the table of bad inputs damages, one thing at a time.

model/        a Hugging Face folder                     sharded/    the same in several shards, with an index
megatron/     what `convert import` made of it          padded/     the same with rows for more ids
data.jsonl    conversations and a text
train.yaml, distill.yaml, online.yaml, teach.yaml, eval.yaml        run files that name these; recipe.yaml
fuse.yaml, project.yaml, map.npz                        the same tokenizer's store, taught through a map
store/        what `teach` made                         run/        what `train` made: two iterations, a checkpoint
prompts.jsonl, groups.jsonl, scored.jsonl               prompts; a prompt with responses; ten with rewards
rewarding/, mutual.yaml       a reward model, and a recipe in which policy and reward model teach each other
sample.yaml, verify.yaml, judge.yaml, rules.yaml, select.yaml, tasks.yaml, score.yaml       run files that name these
order.json    two blocks to remove                      prune.yaml, prune_eval.yaml, prune_recipe.yaml
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForSequenceClassification

from benchmarks import tiny
from fusemega.align.make_map import exact_map
from fusemega.align.vocabulary import Vocabulary
from fusemega.config import validate
from fusemega.convert.convert import import_hf
from fusemega.scoring.teach import TeachRun, teach
from fusemega.text.tokenizer import Tokenizer
from fusemega.training.assembly import train
from fusemega.training.run_file import TrainRun

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": f"{word}, gladly"}]}
    for word in ("one", "two", "three", "four", "five", "six")
] + [{"text": "a plain text"}]
MODEL = {"load": "model", "dtype": "fp32"}
DATA = {"path": "data.jsonl", "seq_length": 64}
TRAIN = {
    "output_dir": "run",
    "model": MODEL,
    "data": DATA,
    "objective": {"name": "sft"},
    "optimizer": {"lr": 1e-3},
    "training": {"train_iters": 2, "global_batch_size": 2, "export_hf": False},
}
SIDE = {"tokenizer": "model", "store": "store"}
TEACHER = {"store": "store", "map": "map.npz"}
TEACH = {"model": MODEL, "data": DATA, "store": "store", "top_k": 4}
FILES: dict[str, dict[str, Any]] = {
    "train.yaml": {**TRAIN, "output_dir": "new"},
    "resume.yaml": TRAIN,
    "distill.yaml": {**TRAIN, "output_dir": "new", "objective": {"name": "distill", "store": "store"}},
    "online.yaml": {
        **TRAIN,
        "output_dir": "new",
        "objective": {"name": "online_distill", "teacher": {"load": "sharded", "dtype": "fp32"}},
    },
    "fuse.yaml": {**TRAIN, "output_dir": "new", "objective": {"name": "fuse", "teachers": [TEACHER]}},
    "project.yaml": {"data": DATA, "source": SIDE, "target": SIDE, "map": "map.npz", "store": "new", "workers": 1},
    "teach.yaml": {**TEACH, "store": "new"},
    "more.yaml": TEACH,
    "eval.yaml": {"model": MODEL, "data": DATA, "output": "new.json"},
    "recipe.yaml": {
        "recipe": "fuse",
        "output_dir": "new",
        "target": "model",
        "sources": {"one": "sharded"},
        "model": {"dtype": "fp32"},
        "data": "data.jsonl",
        "held_out": "data.jsonl",
        "optimizer": {"lr": 1e-3},
        "training": {"train_iters": 2, "global_batch_size": 2},
        "merge": {},
    },
}

PROMPTS = [{"prompt": f"say {word}", "answer": word} for word in ("one", "two")]
GROUP: dict[str, Any] = {
    "prompt": "1 + 1?",
    "answer": "2",
    "responses": [{"text": text, "source": "a"} for text in ("2", "3")],
}
SCORED = [
    {
        "prompt": f"{number}?",
        "domain": "instruction",
        "responses": [{"text": text, "source": "a", "reward": reward} for text, reward in (("2", 0.3), ("3", 0.2))],
    }
    for number in range(10)
]
ENGINE = {"name": "transformers", "load": "model", "dtype": "fp32"}
FILES |= {
    "sample.yaml": {
        "source": "a",
        "prompts": {"path": "prompts.jsonl"},
        "output": "new.jsonl",
        "engine": ENGINE,
        "sampling": {"n": 1, "max_tokens": 2},
    },
    "verify.yaml": {"data": "groups.jsonl", "output": "new.jsonl", "maths": {}},
    "judge.yaml": {"data": "groups.jsonl", "output": "new.jsonl", "engine": ENGINE, "sampling": {"max_tokens": 2}},
    "rules.yaml": {"data": "groups.jsonl", "output": "new.jsonl", "rules": [{"name": "exact"}]},
    "select.yaml": {"data": "scored.jsonl", "output_dir": "new", "protocol": "fusechat3"},
    "tasks.yaml": {
        "engine": ENGINE,
        "sampling": {"max_tokens": 2},
        "tasks": {"sums": {"name": "gsm8k", "data": {"path": "questions.jsonl"}}},
        "output_dir": "new",
    },
    "score.yaml": {"model": MODEL, "data": DATA, "output": "new.jsonl"},
}
PRUNE = {"model": MODEL, "data": DATA, "windows": "rows"}
FILES |= {
    "prune.yaml": {**PRUNE, "blocks": 2, "output": "new"},
    "prune_eval.yaml": {**PRUNE, "order": "order.json", "output": "new.json"},
    "prune_recipe.yaml": {
        "recipe": "blockpruner",
        "output_dir": "new",
        "load": "model",
        "model": {"dtype": "fp32"},
        "blocks": 2,
        "order": "order.json",
        "data": "data.jsonl",
        "optimizer": {"lr": 1e-3},
        "training": {"train_iters": 2, "global_batch_size": 2},
    },
}
SHORT = {"optimizer": {"lr": 1e-3}, "training": {"train_iters": 1, "global_batch_size": 1}}
FILES["mutual.yaml"] = {
    "recipe": "mutual_taught",
    "output_dir": "new",
    "target": "model",
    "model": {"dtype": "fp32"},
    "reward_model": {"load": "rewarding", "dtype": "fp32"},
    "prompts": "prompts.jsonl",
    "splits": {"selection": 1},
    "iterations": 1,
    "policy": {**SHORT, "training": {**SHORT["training"], "save_interval": 1}},
    "reward": SHORT,
}
ORDER = {"1": [["mha", 1]], "2": [["mha", 1], ["mlp", 1]]}  # in the form of BlockPruner's authors


def build() -> None:
    """All of it, in the current folder. Takes a few seconds."""
    questions = [{"question": "1 + 1?", "answer": "#### 2"}]
    for path, rows in (
        ("data", ROWS),
        ("prompts", PROMPTS),
        ("groups", [GROUP]),
        ("scored", SCORED),
        ("questions", questions),
    ):
        Path(f"{path}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Path("order.json").write_text(json.dumps(ORDER), encoding="utf-8")
    for name, run in FILES.items():
        Path(name).write_text(yaml.safe_dump(run), encoding="utf-8")
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    tiny.write_model(Path("model"), Path("data.jsonl"), vocab_size=300, **size)
    AutoModelForCausalLM.from_pretrained("model").save_pretrained("sharded", max_shard_size="30KB")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        Path("sharded", name).write_bytes(Path("model", name).read_bytes())
    scored = LlamaForSequenceClassification(AutoConfig.from_pretrained("model", num_labels=1))
    scored.save_pretrained("rewarding")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        Path("rewarding", name).write_bytes(Path("model", name).read_bytes())
    shutil.copytree("model", "padded")
    tiny.pad_vocabulary(Path("padded"), 307)
    import_hf("model", "megatron")
    teach(validate(TeachRun, TEACH, "more.yaml"))
    train(validate(TrainRun, TRAIN, "resume.yaml"))
    vocabulary = Vocabulary.of(Tokenizer.load("model"))
    exact_map(vocabulary, vocabulary).save("map.npz")
