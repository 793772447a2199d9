"""`fusemega convert import` and `export` against `cp` of the same bytes: time and peak memory, side by side.

    python benchmarks/convert.py [--model 1gb|7b] [--repeats 3] [--workers N] [--only import|export] [--work DIR]

The source is a synthetic Llama folder of random bytes (random bits: NaNs and infinities of every kind are among them).
Each repeat runs `cp -r`, then the command as a user would, each with the source's files dropped from the page cache and
each until its bytes are on the disk (fsync). `ratio` counts the whole command; `ratio_without_start` leaves out the
start of Python and the import of torch, which the command does not count either. At the end `convert verify` holds the
result against the source bit for bit. Peak memory is that of the process tree, sampled every 20 ms; the limit is the
largest tensor of the folder and 1 GiB. `--work` keeps the source and the Megatron folder for a later call, so that the
two directions can be measured in two calls. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from fusemega.hf.folder import HFFolder
from fusemega.hf.safetensors_writer import MAX_SHARD_SIZE, TensorInfo, file_header, plan_shards, write_index
from fusemega.models.registry import architecture_of
from fusemega.runtime.workers import default_workers

MODELS: dict[str, dict[str, int]] = {
    "1gb": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "num_hidden_layers": 7,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
    "7b": {  # Llama-2-7B
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}
GIB = 1 << 30


def write_source(folder: Path, model: str) -> None:
    """A bf16 folder of that shape, its weights random bytes."""
    config = {"model_type": "llama", "dtype": "bfloat16", "rms_norm_eps": 1e-5, **MODELS[model]}
    tensors = [
        TensorInfo(name, torch.bfloat16, shape)
        for rule in architecture_of(config).rules()
        for name, shape in rule.hf_shapes().items()
    ]
    folder.mkdir(parents=True)
    shards = plan_shards(tensors, MAX_SHARD_SIZE)
    random = np.random.default_rng(0)
    for file, shard in shards.items():
        with open(folder / file, "wb") as out:
            out.write(file_header(shard))
            left = sum(info.nbytes for info in shard)
            while left:
                out.write(random.bytes(min(left, 1 << 24)))
                left -= min(left, 1 << 24)
    write_index(folder, shards)
    (folder / "config.json").write_text(json.dumps(config))


def evict(folder: Path) -> None:
    """Drop a folder's files from the page cache (written first); a hypervisor's own cache is beyond reach."""
    for path in folder.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        if path.is_file():
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copy(source: Path, target: Path) -> dict[str, float]:
    """`cp -r` until its bytes are on the disk."""
    evict(source)
    begun = time.monotonic()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    cached = time.monotonic() - begun
    for path in target.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.monotonic() - begun
    shutil.rmtree(target)
    return {"seconds": seconds, "seconds_before_fsync": cached}


def convert(direction: str, source: Path, target: Path, workers: int) -> dict[str, float]:
    """One command, and the most memory its processes had at one time."""
    evict(source)
    begun = time.monotonic()
    command = [sys.executable, "-m", "fusemega", "convert", direction, str(source), str(target)]
    command += ["--workers", str(workers)]
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                peak = max(peak, sum(_resident(member) for member in [tree, *tree.children(recursive=True)]))
            time.sleep(0.02)
        assert process.stdout is not None
        last = process.stdout.read().strip()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {process.returncode}")
    seconds = time.monotonic() - begun
    print(f"  {last}", flush=True)
    own = re.search(r" in ([\d.]+) s ", last)
    assert own is not None
    return {"seconds": seconds, "seconds_without_start": float(own[1]), "peak_bytes": peak}


def _resident(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.NoSuchProcess):
        return int(process.memory_info().rss)
    return 0


def measure(direction: str, source: Path, target: Path, workers: int, repeats: int, limit: int) -> dict[str, Any]:
    """`cp` and the command in turn; the target of the last repeat stays."""
    pairs = []
    for repeat in range(repeats):
        copied = copy(source, target.with_name("copy"))
        shutil.rmtree(target, ignore_errors=True)
        converted = convert(direction, source, target, workers)
        pairs.append((copied, converted))
        times = f"cp {copied['seconds']:.1f} s, convert {converted['seconds']:.1f} s"
        print(f"{direction} {repeat + 1}: {times}", flush=True)
    peak = int(max(converted["peak_bytes"] for _, converted in pairs))
    ratios = [converted["seconds"] / copied["seconds"] for copied, converted in pairs]
    started = [converted["seconds_without_start"] / copied["seconds"] for copied, converted in pairs]
    return {
        "cp_seconds": [round(copied["seconds"], 2) for copied, _ in pairs],
        "cp_seconds_before_fsync": [round(copied["seconds_before_fsync"], 2) for copied, _ in pairs],
        "convert_seconds": [round(converted["seconds"], 2) for _, converted in pairs],
        "convert_seconds_without_start": [converted["seconds_without_start"] for _, converted in pairs],
        "ratio": round(statistics.median(ratios), 3),
        "ratio_without_start": round(statistics.median(started), 3),
        "ratio_worst": round(max(ratios), 3),
        "peak_mib": round(peak / 2**20),
        "limit_mib": round(limit / 2**20),
        "ok": statistics.median(ratios) <= 1.5 and peak <= limit,
    }


@contextlib.contextmanager
def work_folder(path: Path | None) -> Iterator[Path]:
    if path is not None:
        path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="fusemega-convert-") as folder:
        yield Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="1gb")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=default_workers())
    parser.add_argument("--only", choices=["import", "export"])
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    with work_folder(args.work) as work:
        source, megatron, exported = work / "hf", work / "megatron", work / "exported"
        if not source.exists():
            write_source(source, args.model)
        folder = HFFolder(source)
        sizes = [torch.Size(folder.shape(name)).numel() * 2 for name in folder]
        needed = 3 * sum(sizes) - sum(file.stat().st_size for file in megatron.rglob("*") if file.is_file())
        if shutil.disk_usage(work).free < needed - sum(sizes):
            raise SystemExit(f"{work}: needs {(needed - sum(sizes)) / 1e9:.1f} GB free")
        limit = max(sizes) + GIB
        result: dict[str, Any] = {
            "benchmark": "convert",
            "model": args.model,
            "weights_gb": round(sum(sizes) / 1e9, 3),
            "largest_tensor_mib": round(max(sizes) / 2**20),
            "workers": args.workers,
            "cores": len(os.sched_getaffinity(0)),
        }
        done = []
        if args.only != "export":
            result["import"] = measure("import", source, megatron, args.workers, args.repeats, limit)
            done.append(megatron)
        if args.only != "import":
            result["export"] = measure("export", megatron, exported, args.workers, args.repeats, limit)
            done.append(exported)
        for other in done:
            found = json.loads(_verify(source, other, args.workers))
            result[f"{other.name}_identical"] = found["identical"]
        shutil.rmtree(exported, ignore_errors=True)
    directions = [result[name] for name in ("import", "export") if name in result]
    identical = all(result[f"{other.name}_identical"] for other in done)
    result["ok"] = identical and all(direction["ok"] for direction in directions)
    print(json.dumps(result))
    sys.exit(not result["ok"])


def _verify(source: Path, other: Path, workers: int) -> str:
    command = [sys.executable, "-m", "fusemega", "convert", "verify", str(source), str(other)]
    command += ["--workers", str(workers)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
