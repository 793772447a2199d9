"""The sample store: bytes a position, what the coding costs in accuracy, and shuffled reads beside a training step.

    python benchmarks/store.py [--samples 100] [--megabytes 400] [--work DIR]

Rows are SmolLM2-135M-Instruct's own on real conversations, k = 10, as `fusemega teach` would write them. The error is
KL(fp32 row || row as read), with the residual as one more outcome, in float64. Bytes are those of all shards, index
included, at the model's vocabulary of 49,152 and at 262,144. For the reads the rows are repeated under other keys up
to `--megabytes`; cold means that the shards are not in the page cache (the bytes that came from the disk are counted),
warm that they are. The step is one of `fusemega train` on such conversations, objective sft, 4 samples, fp32, on all
cores; the reads' share of it is that of 4 rows.

`fuse_over_sft` are such steps with two teachers of other tokenizers (Qwen2.5's and Llama-3's, rows of made-up ids)
against the same steps without, in turn: the median of the ratios, rows being read, aligned and projected
in the step. `ok` is whether all that keeps the limits in `LIMITS`. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

K, SEQ_LENGTH, GLOBAL_BATCH, STEPS, CHARACTERS = 10, 512, 4, 8, 1200
LIMITS = {
    "bytes_per_position_262144": 38,
    "kl_mean": 1e-3,
    "kl_max": 5e-3,
    "cold_share_of_step": 0.01,
    "warm_share_of_step": 0.01,
    "fuse_min_ce_over_sft": 1.05,
    "fuse_avg_ce_over_sft": 1.05,
}
TEACHERS = ("qwen2.5", "llama3")


def samples_of(count: int) -> list[Any]:
    """Windows of real conversations with their supervised positions."""
    from fusemega.files.cache import cache_folder
    from fusemega.fixtures.data import chat_data, smollm2
    from fusemega.text.data import DataConfig
    from fusemega.text.dataset import prepare
    from fusemega.text.tokenizer import Tokenizer

    config = DataConfig(path=str(chat_data().train), seq_length=SEQ_LENGTH, limit=count)
    dataset = prepare(config, Tokenizer.load(smollm2()), cache_folder() / "data", vocab_size=49152)
    return list(dataset)[:count]


def teacher_rows(samples: Sequence[Any]) -> list[Any]:
    """The model's fp32 rows."""
    from transformers import AutoModelForCausalLM

    from fusemega.fixtures.data import smollm2
    from fusemega.logits.topk import top_k_log_probs
    from fusemega.store import Row

    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
    rows = []
    for sample in samples:
        ids = torch.tensor(sample.ids.astype("int64"))
        with torch.no_grad():
            hidden = model.model(ids[None]).last_hidden_state[0][sample.positions]
        weight, labels = model.lm_head.weight, ids[sample.positions + 1]
        columns = top_k_log_probs(hidden, weight, K, labels, vocab_size=len(weight))
        ids_PK, logp_PK, log_residual_P, label_logp_P = (column.numpy() for column in columns)
        ends = sample.end_bytes[sample.positions]
        total = float(label_logp_P.sum())
        row = Row(sample.ids_hash, ends, ids_PK.astype("i4"), logp_PK, log_residual_P, total, sample.num_bytes)
        rows.append(dataclasses.replace(row, label_ids_P=labels.numpy().astype("i4"), label_logp_P=label_logp_P))
    return rows


def write(folder: Path, rows: Sequence[Any], vocab_size: int, megabytes: float = 0) -> Any:
    """A store of the rows, repeated under other keys until it has that size at least."""
    from fusemega.store import Manifest, Store, StoreWriter

    manifest = Manifest(
        weights="w", tokenizer="t", template="c", mask_policy="m", truncation=SEQ_LENGTH, temperature=1.0, top_k=K,
        vocab_size=vocab_size,
    )  # fmt: skip
    times = max(1, round(megabytes * 1e6 / (32 * sum(row.num_tokens for row in rows))))
    with StoreWriter(folder, manifest) as writer:
        for n in range(times * len(rows)):
            writer.add(key_of(n), rows[n % len(rows)])
    return Store.open(folder)


def key_of(n: int) -> bytes:
    return (n * 0x9E3779B97F4A7C15 % 2**64).to_bytes(16, "little")


def size_of(store: Any) -> int:
    return sum(shard.path.stat().st_size for shard in store.shards)


def errors(store: Any, rows: Sequence[Any]) -> np.ndarray:
    """KL of every position."""
    found = []
    for n, row in enumerate(rows):
        read = store.get(key_of(n))
        given, got = (np.column_stack([r.logp_PK, r.log_residual_P]).astype(np.float64) for r in (row, read))
        given -= np.log(np.exp(given).sum(1, keepdims=True))
        p = np.exp(given)
        found.append(np.where(p > 0, p * (given - np.where(p > 0, got, 0.0)), 0.0).sum(1))
    return np.concatenate(found)


def reads(path: Path, keys: Sequence[bytes]) -> tuple[float, int]:
    """Mean microseconds of a read, and the bytes that came from the disk meanwhile."""
    from fusemega.store import Store

    store, times = Store.open(path), []
    before = disk_bytes()
    for key in keys:
        started = time.perf_counter()
        store.get(key)
        times.append(time.perf_counter() - started)
    return statistics.fmean(times) * 1e6, disk_bytes() - before


def disk_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


def forget(store: Any) -> None:
    """Takes the shards out of the page cache."""
    from fusemega.store import shard

    shard._mapped.cache_clear()
    for one in store.shards:
        with one.path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_chat(work: Path) -> Path:
    """Conversations short enough to be one window in every tokenizer."""
    from fusemega.fixtures.data import chat_data

    lines = chat_data().train.read_text(encoding="utf-8").splitlines()
    short = [x for x in lines if sum(len(m["content"]) for m in json.loads(x)["messages"]) < CHARACTERS]
    (work / "chat.jsonl").write_text("\n".join(short[:200]) + "\n", encoding="utf-8")
    return work / "chat.jsonl"


def teacher_of(work: Path, name: str, chat: Path, rows: Sequence[Any]) -> dict[str, str]:
    """A store of another tokenizer's rows of the conversations, with made-up ids, and the map from it."""
    from fusemega.align.make_map import exact_map
    from fusemega.align.vocabulary import Vocabulary
    from fusemega.files.cache import cache_folder
    from fusemega.fixtures.data import smollm2
    from fusemega.fixtures.tokenizers import tokenizer
    from fusemega.store import Manifest, Row, StoreWriter
    from fusemega.text.data import DataConfig
    from fusemega.text.dataset import prepare
    from fusemega.text.document import MASK_POLICY
    from fusemega.text.tokenizer import Tokenizer

    source, target = Tokenizer.load(tokenizer(name)), Tokenizer.load(smollm2())
    exact_map(Vocabulary.of(source), Vocabulary.of(target)).save(work / f"{name}.map")
    manifest = Manifest(
        weights=name, tokenizer=source.content_hash, template=source.template_hash, mask_policy=MASK_POLICY,
        truncation=SEQ_LENGTH, temperature=1.0, top_k=K, vocab_size=source.num_ids,
    )  # fmt: skip
    logp_NE = np.concatenate([np.column_stack([row.logp_PK, row.log_residual_P]) for row in rows])
    rng = np.random.default_rng(0)
    with StoreWriter(work / name, manifest) as writer:
        for sample in prepare(DataConfig(path=str(chat), seq_length=SEQ_LENGTH), source, cache_folder() / "data"):
            places = sample.positions
            logp_PE = logp_NE[rng.integers(0, len(logp_NE), len(places))]
            ids_PK = (sample.ids[places + 1, None] + 997 * np.arange(K)) % source.num_ids  # the label first
            ends, nats = sample.end_bytes[places], float(rng.uniform(1, 2) * len(places))
            ids_PK = ids_PK.astype("i4")
            writer.add(
                sample.key,
                Row(sample.ids_hash, ends, ids_PK, logp_PE[:, :K], logp_PE[:, K], -nats, sample.num_bytes),
            )
    return {"store": str(work / name), "map": str(work / f"{name}.map")}


def step_seconds(work: Path, chat: Path, objectives: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float]]:
    """Seconds of steps on the same samples with each objective, in turn; the first of each is not counted."""
    from fusemega.config import validate
    from fusemega.fixtures.data import smollm2
    from fusemega.losses.registry import build_objective, parse_objective
    from fusemega.training.assembly import open_trainer
    from fusemega.training.run_file import TrainRun

    settings = {
        "output_dir": str(work / "run"),
        "model": {"load": str(smollm2()), "dtype": "fp32"},
        "data": {"path": str(chat), "seq_length": SEQ_LENGTH},
        "objective": {"name": "sft"},
        "optimizer": {"lr": 1e-5},
        "training": {"train_iters": STEPS, "global_batch_size": GLOBAL_BATCH, "export_hf": False},
    }
    trainer, checked = open_trainer(validate(TrainRun, settings, "store"))
    built = {
        name: build_objective(parse_objective(dict(section)), checked.source.tokenizer, checked.source.vocab_size)
        for name, section in objectives.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in objectives}
    for step in range(STEPS):
        for name, objective in built.items():
            objective.check_data(trainer.data.dataset)
            trainer.objective, trainer.iteration = objective, step
            trainer.data = dataclasses.replace(trainer.data, fields=objective)
            started = time.perf_counter()
            trainer.step()
            if step:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def measure(work: Path, count: int, megabytes: float) -> dict[str, Any]:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows = teacher_rows(samples_of(count))
    positions = sum(row.num_tokens for row in rows)
    small, large = write(work / "small", rows, 49_152), write(work / "large", rows, 262_144)
    kl = errors(large, rows)
    many = write(work / "many", rows, 262_144, megabytes)
    keys = [key_of(int(n)) for n in np.random.default_rng(0).permutation(len(many))[:3000]]
    forget(many)
    cold, cold_bytes = reads(many.path, keys)
    warm, warm_bytes = reads(many.path, keys)
    chat = write_chat(work)
    teachers = [teacher_of(work, name, chat, rows) for name in TEACHERS]
    objectives: dict[str, Any] = {"sft": {"name": "sft"}}
    for function in ("min_ce", "avg_ce"):
        objectives[f"fuse_{function}"] = {"name": "fuse", "teachers": teachers, "fusion": {"function": function}}
    seconds = step_seconds(work, chat, objectives)
    step = statistics.median(seconds["sft"])
    result: dict[str, Any] = {
        "benchmark": "store",
        "rows": len(rows),
        "positions": positions,
        "bytes_per_position_49152": round(size_of(small) / positions, 2),
        "bytes_per_position_262144": round(size_of(large) / positions, 2),
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "store_megabytes": round(size_of(many) / 1e6),
        "reads": len(keys),
        "cold_read_us": round(cold, 1),
        "cold_kilobytes_from_disk_per_read": round(cold_bytes / len(keys) / 1e3, 1),
        "warm_read_us": round(warm, 1),
        "warm_kilobytes_from_disk_per_read": round(warm_bytes / len(keys) / 1e3, 1),
        "step_seconds": round(step, 3),
        "cold_share_of_step": cold * GLOBAL_BATCH / 1e6 / step,
        "warm_share_of_step": warm * GLOBAL_BATCH / 1e6 / step,
    }
    for name in ("fuse_min_ce", "fuse_avg_ce"):
        ratios = [a / b for a, b in zip(seconds[name], seconds["sft"], strict=True)]
        result[f"{name}_over_sft"] = round(statistics.median(ratios), 3)
        result[f"{name}_ratios"] = [round(ratio, 3) for ratio in ratios]
    result["ok"] = all(result[name] <= limit for name, limit in LIMITS.items())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100, help="conversations whose rows are computed")
    parser.add_argument("--megabytes", type=float, default=400, help="of the store that is read")
    parser.add_argument("--work", type=Path, help="folder for the stores; by default a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="store-", dir=args.work) as work:
        result = measure(Path(work), args.samples, args.megabytes)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
