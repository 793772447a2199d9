"""Merging models of a 7B's shape: resident memory, and time against the disk's own speed.

    python benchmarks/merge_scale.py [--layers 32] [--models 4] [--methods sce linear] [--work FOLDER] [--sparse]

Models have the widths of a 7B Llama (hidden 4096, feed-forward 11008, vocabulary 32000) and `--layers` of its 32.
Without `--sparse` every model is written with random weights, and the merge is timed against reading the same files
once and writing and syncing as many bytes as it writes: the page cache is dropped before each where that is allowed
(root), and otherwise the result says so. With `--sparse` the files are holes that read as zeros, so that models of the
full 13.5 GB can be merged on a small disk: memory is then the full shape's, and time says nothing. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from merge_vs_mergekit import measured

from fusemega.files.lock import locked
from fusemega.files.owned import check_scratch, drop_scratch, mark_scratch, scratch_of
from fusemega.hf.ranges import RangeWriter
from fusemega.hf.safetensors_writer import MAX_SHARD_SIZE, TensorInfo, plan_shards, write_index
from fusemega.models.registry import architecture_of

CHUNK = 16 << 20


def config(layers: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def write_model(folder: Path, layers: int, seed: int, sparse: bool) -> int:
    """Returns the bytes of its weights. Models differ from seed 0 by noise of an rms of 1e-3."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config(layers)))
    shapes = architecture_of(config(layers)).hf_shapes()
    shards = plan_shards([TensorInfo(name, torch.bfloat16, shape) for name, shape in shapes.items()], MAX_SHARD_SIZE)
    writer = RangeWriter(folder, shards)
    write_index(folder, shards)
    if not sparse:
        # One block of random numbers, rolled: random enough for histograms and ties, and not what is measured.
        pool = torch.randn(CHUNK, generator=torch.Generator().manual_seed(0)).mul_(0.02)
        noise = torch.randn(CHUNK, generator=torch.Generator().manual_seed(seed)).mul_(1e-3 if seed else 0)
        block = pool.add_(noise).bfloat16()
        for name, shape in shapes.items():
            elements = torch.Size(shape).numel()
            for start in range(0, elements, CHUNK):
                writer.write(name, start, block[: min(CHUNK, elements - start)])
    writer.sync()
    writer.close()
    return sum(info.nbytes for shard in shards.values() for info in shard)


def drop_cache() -> bool:
    """Whether the page cache could be emptied."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        return False
    return True


def disk_seconds(folders: list[Path], written: int, work: Path) -> tuple[float, float]:
    """(reading every weight file once, writing so many bytes to the disk), in one thread each."""
    begun = time.monotonic()
    buffer = bytearray(CHUNK)
    for folder in folders:
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
    read = time.monotonic() - begun
    begun = time.monotonic()
    with (work / "probe").open("wb", buffering=0) as file:
        for _ in range(0, written, CHUNK):
            file.write(buffer)
        os.fsync(file.fileno())
    seconds = time.monotonic() - begun
    (work / "probe").unlink()
    return read, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--methods", nargs="+", default=["sce", "linear"])
    parser.add_argument("--sparse", action="store_true")
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    # A folder of its own: --work may be one that holds other things.
    work = scratch_of((args.work or Path(tempfile.gettempdir())) / "merge_scale")
    with locked(work):
        check_scratch(work)
        drop_scratch(work)
        mark_scratch(work)
        try:
            measure(args, work)
        finally:
            drop_scratch(work)


def measure(args: argparse.Namespace, work: Path) -> None:
    """All of it, in the empty folder `work`."""
    folders = [work / f"model{seed}" for seed in range(args.models + 1)]
    size = 0
    for seed, folder in enumerate(folders):
        size = write_model(folder, args.layers, seed, args.sparse)
    result: dict[str, Any] = {"benchmark": "merge_scale", "layers": args.layers, "models": args.models}
    result |= {"gb_a_model": size / 1e9, "sparse": args.sparse, "cores": len(os.sched_getaffinity(0))}
    cold = drop_cache()
    if not args.sparse:
        result["disk_read_s"], result["disk_write_s"] = disk_seconds(folders, size, work)
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    for method in args.methods:
        out = work / "out"
        shutil.rmtree(out, ignore_errors=True)
        drop_cache()
        command = [sys.executable, "-m", "fusemega", "merge", str(out), "--method", method, "--base", str(folders[0])]
        command += ["--vocabulary", "position", "--models", *map(str, folders[1:])]  # they have no tokenizer
        command += ["parameters.select_topk=0.1"] if method.startswith("sce") else []
        plan = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, check=True).stdout
        seconds, memory, _ = measured(command, work / "log")
        result[method] = {"seconds": round(seconds, 1), "peak_gib": round(memory * 1e9 / 2**30, 3)}
        result[method]["planned"] = plan.splitlines()[-1]
        if not args.sparse:
            disk = result["disk_read_s"] + result["disk_write_s"]
            result[method] |= {"times_the_disk": round(seconds / disk, 2)}
        print(json.dumps({method: result[method]}), flush=True)
    print(json.dumps(result | {"page_cache_dropped": cold, "load_at_end": os.getloadavg()[0]}))


if __name__ == "__main__":
    main()
