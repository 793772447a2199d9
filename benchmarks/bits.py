"""Do two versions of this project compute the same bits?

    git worktree add ../before COMMIT
    python benchmarks/bits.py ../before .

Makes small inputs once (random Llamas on real chat text, with two tokenizers), then runs the same commands with each
checkout's code: training in several layouts and with every objective, teaching, alignment, projection, transplanting,
splitting, every merge method, conversions and evaluation. Takes the sha256 of what each wrote: weights, checkpoints'
weight files, stores, maps, merges, and the curves of losses, gradient norms and evaluations. The last line is one JSON
object; `ok` says whether all of them are the same. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

SEQ_LENGTH = 256
# method -> its settings, and those of each model
MERGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({}, {"weight": 1.0}),
    "slerp": ({"t": 0.3}, {}),
    "task_arithmetic": ({"lambda": 0.7}, {"weight": 1.0}),
    "ties": ({}, {"weight": 1.0, "density": 0.5}),
    "dare_linear": ({}, {"weight": 1.0, "density": 0.5}),
    "dare_ties": ({}, {"weight": 1.0, "density": 0.5}),
    "della": ({}, {"weight": 1.0, "density": 0.5, "epsilon": 0.1}),
    "sce": ({"select_topk": 0.5}, {}),
    "sce_paper": ({"select_topk": 0.5}, {}),
    "sce_mergekit": ({"select_topk": 0.5}, {}),
    "varm": ({}, {}),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {},
    "TP2+SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipeline_model_parallel_size": 2},
    "CP2": {"context_parallel_size": 2},
    "DP2": {},
}
CURVES = ("loss", "lm loss", "distill loss", "grad-norm", "learning-rate", "consumed-samples", "tokens")


class Version:
    """One checkout at work in a folder of its own.

    Args:
        checkout: its code.
        inputs: what `make_inputs` wrote.
        out: an empty folder.
    """

    def __init__(self, checkout: Path, inputs: Path, out: Path) -> None:
        self.checkout, self.inputs, self.out = checkout, inputs, out
        self.hashes: dict[str, str] = {}
        # One cache for each: tokenized rows are made by the code that is asked about.
        cache = out / "cache"
        self.environment = os.environ | {
            "PYTHONPATH": str(checkout),
            "OMP_NUM_THREADS": "1",
            "FUSEMEGA_CACHE": str(cache),
            "FUSEMEGA_DEVICE": "cpu",
        }

    def command(self, *argv: str) -> None:
        """Runs `fusemega *argv`; a command that fails ends everything."""
        command = [sys.executable, "-m", "fusemega", *argv]
        done = subprocess.run(command, cwd=self.out, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{self.checkout}: fusemega {' '.join(argv)} failed:\n{done.stderr[-3000:]}")

    def run_file(self, command: str, name: str, run: dict[str, Any], nproc: int = 1) -> None:
        """Writes a run file and runs it."""
        path = self.out / f"{name}.yaml"
        path.write_text(yaml.safe_dump(run, sort_keys=False), encoding="utf-8")
        self.command(command, str(path), *(["--nproc", str(nproc)] if nproc > 1 else []))

    def keep(self, name: str, *contents: bytes) -> None:
        """One line of the comparison."""
        digest = hashlib.sha256()
        for content in contents:
            digest.update(content)
        self.hashes[name] = digest.hexdigest()

    def keep_files(self, name: str, folder: Path, *patterns: str) -> None:
        """The contents of files, by name; a pattern that finds none ends everything."""
        found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
        if not found:
            raise SystemExit(f"{self.checkout}: {name}: no {' or '.join(patterns)} in {folder}")
        self.keep(name, *(str(path.relative_to(folder)).encode() + path.read_bytes() for path in found))

    def everything(self) -> None:
        """All commands, in an order in which each finds what it needs."""
        self._teach()
        self._train()
        self._convert()
        self._align()
        self._fuse()
        self._merge()

    def _data(self) -> dict[str, Any]:
        return {"path": str(self.inputs / "chat.jsonl"), "seq_length": SEQ_LENGTH}

    def _teach(self) -> None:
        kinds: dict[str, dict[str, Any]] = {
            "top_k": {"top_k": 5},
            "sampled": {"rows": "sampled", "num_samples": 8, "seed": 3},
        }
        for kind, settings in kinds.items():
            run = {"model": {"load": str(self.inputs / "teacher")}, "data": self._data(), "store": kind, **settings}
            self.run_file("teach", f"teach-{kind}", run)
            self.keep_files(f"store, {kind}", self.out / kind, "*.shard", "shards/*", "*.bin")

    def _train(self) -> None:
        objectives: dict[str, dict[str, Any]] = {
            "sft": {"name": "sft"},
            "distill": {"name": "distill", "store": "top_k", "lambda": 0.5},
            "sampled": {"name": "distill", "store": "sampled", "lambda": 0.5},
            "online": {
                "name": "online_distill",
                "teacher": {"load": str(self.inputs / "teacher")},
                "divergence": "jsd",
                "lambda": 0.5,
            },
        }
        for layout, parallel in LAYOUTS.items():
            self._one_run(f"sft, {layout}", objectives["sft"], parallel, 1 if layout == "one process" else 2)
        for name, objective in objectives.items():
            if name != "sft":
                self._one_run(f"{name}, PP2", objective, LAYOUTS["PP2"], 2)
        evaluation = {"model": {"load": "sft, one process"}, "data": self._data(), "output": "eval.json"}
        evaluation["reference"] = {"load": str(self.inputs / "teacher")}
        self.run_file("eval", "eval", evaluation)
        self.keep_files("evaluation", self.out, "eval.json")

    def _one_run(self, name: str, objective: dict[str, Any], parallel: dict[str, Any], nproc: int) -> None:
        run = {
            "output_dir": name,
            "model": {"load": str(self.inputs / "target"), "dtype": "fp32"},
            "parallel": parallel,
            "data": self._data(),
            "objective": objective,
            "optimizer": {"lr": 1e-3, "lr_warmup_fraction": 0.1},
            "training": {"train_iters": 6, "global_batch_size": 4, "save_interval": 3},
            "evaluation": {"data": self._data(), "interval": 3},
        }
        self.run_file("train", name, run, nproc)
        self.keep(f"curve of {name}", *self._curve(self.out / name))
        self.keep_files(f"weights of {name}", self.out / name / "hf", "*.safetensors")

    @staticmethod
    def _curve(folder: Path) -> Iterator[bytes]:
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            for line in (folder / name).read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                kept = {key: value for key, value in row.items() if key in CURVES or name == "evaluations.jsonl"}
                yield json.dumps(kept, sort_keys=True).encode()

    @staticmethod
    def _map(path: Path) -> Iterator[bytes]:
        """All that a map holds but the time that it took to make."""
        with np.load(path) as arrays:
            facts = json.loads(arrays["facts"].tobytes())
            del facts["statistics"]["seconds"]
            yield json.dumps(facts, sort_keys=True).encode()
            yield from (name.encode() + arrays[name].tobytes() for name in sorted(arrays.files) if name != "facts")

    def _convert(self) -> None:
        self.command("convert", "import", str(self.inputs / "target"), "megatron")
        self.keep_files("imported", self.out / "megatron", "weights/*.distcp")
        self.command("convert", "export", "sft, PP2", "exported")
        self.keep_files("exported", self.out / "exported", "*.safetensors", "config.json")

    def _align(self) -> None:
        teacher, target = str(self.inputs / "other"), str(self.inputs / "target")
        for kind in ("first_piece", "exact", "mined", "ms"):
            data = ["--data", str(self.inputs / "chat.jsonl")] if kind == "ms" else []
            self.command("align", teacher, target, f"{kind}.map", "--kind", kind, *data)
            self.keep(f"map, {kind}", *self._map(self.out / f"{kind}.map"))
        self.command("transplant", target, "transplanted", "--tokenizer", teacher)
        self.keep_files("transplanted", self.out / "transplanted", "*.safetensors")
        tokenizers = ["--tokenizers", target, teacher, "--max-tokens", "100"]
        self.command("split", str(self.inputs / "texts.jsonl"), "split.jsonl", *tokenizers)
        self.keep_files("split", self.out, "split.jsonl")

    def _fuse(self) -> None:
        run = {"model": {"load": str(self.inputs / "other")}, "data": self._data(), "store": "others", "top_k": 5}
        self.run_file("teach", "teach-others", run)
        teachers = [{"store": "top_k"}, {"store": "others", "map": "first_piece.map"}]
        for function in ("min_ce", "avg_ce"):
            objective = {"name": "fuse", "teachers": teachers, "lambda": 0.5, "fusion": {"function": function}}
            self._one_run(f"fuse {function}, TP2+SP", objective, LAYOUTS["TP2+SP"], 2)

    def _merge(self) -> None:
        trained = [str(self.out / name / "hf") for name in ("sft, one process", "distill, PP2")]
        for method, (parameters, of_each) in MERGES.items():
            models = [{"model": load, "parameters": of_each} for load in trained]
            run: dict[str, Any] = {"merge_method": method, "models": models, "parameters": parameters}
            if method != "linear":
                run["base_model"] = str(self.inputs / "target") if method != "slerp" else trained[0]
            path = self.out / f"merge-{method}.yaml"
            path.write_text(yaml.safe_dump(run, sort_keys=False), encoding="utf-8")
            self.command("merge", str(path), f"merged-{method}")
            self.keep_files(f"merge, {method}", self.out / f"merged-{method}", "*.safetensors")


def make_inputs(folder: Path) -> None:
    """Text, a target, a teacher of its tokenizer, and a teacher of another."""
    from tiny import write_chat, write_model

    folder.mkdir(parents=True)
    chat = write_chat(folder / "chat.jsonl", rows=24, characters=160)
    texts = [json.loads(line)["messages"][-1]["content"] for line in chat.read_text(encoding="utf-8").splitlines()]
    rows = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "texts.jsonl").write_text("".join(rows), encoding="utf-8")
    write_model(folder / "target", chat)
    write_model(folder / "teacher", chat, seed=1, num_hidden_layers=2, hidden_size=96)
    write_model(folder / "other", chat, seed=2, vocab_size=331, num_hidden_layers=2)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout of this project")
    parser.add_argument("after", type=Path, help="another")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fusemega-bits-") as scratch:
        inputs = Path(scratch) / "inputs"
        make_inputs(inputs)
        versions = []
        for name in ("before", "after"):
            out = Path(scratch) / name
            out.mkdir()
            version, begun = Version(getattr(options, name).resolve(), inputs, out), time.monotonic()
            version.everything()
            print(f"{name}: {version.checkout}: {len(version.hashes)} hashes in {time.monotonic() - begun:.0f} s")
            versions.append(version.hashes)
    before, after = versions
    differ = sorted(name for name in before | after if before.get(name) != after.get(name))
    for name in sorted(before | after):
        print(f"{'DIFFERS' if name in differ else 'same   '} {after.get(name, '-')[:16]}  {name}")
    print(json.dumps({"benchmark": "bits", "ok": not differ, "compared": len(before | after), "differ": differ}))
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
