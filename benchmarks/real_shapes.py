"""What `fusemega convert import --dry-run` says of the largest models, and whether its plan holds: on sparse files.

    python benchmarks/real_shapes.py [--models mistral-large llama-405b ...] [--work FOLDER]

A folder has the configuration and the headers of a published model's files, whose weights are holes that take no place
on the disk. For each model and layout: the seconds and the peak memory of the whole command (the target is a minute,
and 2 GiB: it must not grow with the model), and, from the same rules, whether every element of every tensor is on
exactly one rank and each parameter is filled once. The last line is one JSON object; exit status 1 if a plan has a gap
or an overlap.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import torch

from fusemega.files.boxes import Box, volume
from fusemega.hf.safetensors_writer import MAX_SHARD_SIZE, TensorInfo, file_header, plan_shards, write_index
from fusemega.models.registry import architecture_of
from fusemega.models.rules import WeightRanks
from fusemega.models.stages import stage_rules
from fusemega.runtime.layout import ParallelConfig

LIMIT_SECONDS, LIMIT_BYTES = 60, 2 << 30
_COMMON: dict[str, Any] = {"rms_norm_eps": 1e-5, "hidden_act": "silu", "torch_dtype": "bfloat16"}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _sizes(hidden: int, ffn: int, layers: int, heads: int, groups: int, vocab: int) -> dict[str, Any]:
    return _COMMON | {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocab,
    }


# name -> (configuration, parameters as published, layouts as (TP, PP) or (TP, PP, EP))
MODELS: dict[str, tuple[dict[str, Any], int, list[tuple[int, ...]]]] = {
    "mistral-large": (  # Mistral-Large-Instruct-2407
        _sizes(12288, 28672, 88, 96, 8, 32768)
        | {"model_type": "mistral", "sliding_window": None, "head_dim": 128, "max_position_embeddings": 131072},
        122_610_069_504,
        [(8, 4), (16, 2)],
    ),
    "llama-70b": (  # Llama-3.1-70B
        _sizes(8192, 28672, 80, 64, 8, 128256)
        | {"model_type": "llama", "rope_scaling": _LLAMA3, "max_position_embeddings": 131072},
        70_553_706_496,
        [(8, 4), (16, 2)],
    ),
    "llama-405b": (  # Llama-3.1-405B, with 8 key/value heads
        _sizes(16384, 53248, 126, 128, 8, 128256)
        | {"model_type": "llama", "rope_scaling": _LLAMA3, "max_position_embeddings": 131072},
        405_853_388_800,
        [(8, 18), (32, 6)],
    ),
    "internlm2-20b": (
        _sizes(6144, 16384, 48, 48, 8, 92544)
        | {"model_type": "internlm2", "bias": False, "max_position_embeddings": 32768, "rope_theta": 1e6}
        | {"rope_scaling": {"type": "dynamic", "factor": 3.0}},
        19_861_149_696,
        [(8, 2), (16, 1)],
    ),
    "phi-3-medium": (
        _sizes(5120, 17920, 40, 40, 10, 32064)
        | {"model_type": "phi3", "sliding_window": 2047, "max_position_embeddings": 4096},
        13_960_238_080,
        [(5, 4), (10, 2)],
    ),
    "gemma-2-27b": (
        _sizes(4608, 36864, 46, 32, 16, 256000)
        | {"model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "head_dim": 128, "query_pre_attn_scalar": 144},
        27_227_128_320,
        [(8, 2), (16, 2)],
    ),
    "mixtral-8x7b": (
        _sizes(4096, 14336, 32, 32, 8, 32000)
        | {"model_type": "mixtral", "num_local_experts": 8, "rope_theta": 1e6, "max_position_embeddings": 32768},
        46_702_792_704,
        [(1, 1, 8), (4, 2, 8)],
    ),
    "qwen3-235b-a22b": (
        _sizes(4096, 12288, 94, 64, 4, 151936)
        | {"model_type": "qwen3_moe", "num_experts": 128, "moe_intermediate_size": 1536, "head_dim": 128}
        | {"norm_topk_prob": True, "rope_theta": 1e6, "max_position_embeddings": 40960},
        235_093_634_560,
        [(1, 1, 8), (4, 2, 8)],
    ),
}


def write_sparse(folder: Path, config: dict[str, Any]) -> int:
    """The model's folder without weights; returns how many bytes they would have."""
    shapes = architecture_of(config).hf_shapes()
    shards = plan_shards([TensorInfo(name, torch.bfloat16, shape) for name, shape in shapes.items()], MAX_SHARD_SIZE)
    folder.mkdir(parents=True)
    for file, shard in shards.items():
        with open(folder / file, "wb") as out:
            out.write(file_header(shard))
            out.truncate(out.tell() + sum(info.nbytes for info in shard))
    write_index(folder, shards)
    (folder / "config.json").write_text(json.dumps(config))
    return sum(info.nbytes for shard in shards.values() for info in shard)


def plan(folder: Path, tp: int, pp: int, ep: int = 1) -> dict[str, Any]:
    """The command, its seconds and the most memory that it had."""
    command = [sys.executable, "-m", "fusemega", "convert", "import", str(folder), str(folder.with_suffix(".out"))]
    command += ["--dry-run", "--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]
    command += ["--expert-model-parallel-size", str(ep)]
    begun, peak = time.monotonic(), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                own = psutil.Process(process.pid)
                peak, seconds = max(peak, own.memory_info().rss), sum(own.cpu_times()[:2])
            time.sleep(0.02)
        assert process.stdout is not None
        said = process.stdout.read().strip().splitlines()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {process.returncode}")
    return {
        "seconds": round(time.monotonic() - begun, 1),
        "processor_seconds": round(seconds, 1),
        "peak_bytes": peak,
        "said": said[-3],
    }


def holds(config: dict[str, Any], tp: int, pp: int, ep: int = 1) -> bool:
    """Whether each element of each tensor is on one rank (a replicated one: on each tensor-parallel rank; all but
    experts: in each replica), and each element of each parameter, but padding of the vocabulary, has one source."""
    architecture = architecture_of(config)
    layout = ParallelConfig(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, expert_model_parallel_size=ep
    )
    places = WeightRanks.all_of(layout)
    held: dict[str, list[Box]] = defaultdict(list)
    for pp_rank in range(pp):
        for rule in stage_rules(architecture, layout, pp_rank):
            parts: set[tuple[int, int]] = set()
            for place in (place for place in places if rule.held_by(place)):
                pieces = rule.pieces(place)
                if not _disjoint([piece.local_box for piece in pieces]):
                    return False
                part = rule.split(place)
                if not rule.duplicate and part not in parts:
                    parts.add(part)
                    for piece in pieces:
                        held[piece.hf].append(piece.hf_box)
    shapes = architecture.hf_shapes()
    return held.keys() == shapes.keys() and all(
        _disjoint(held[name]) and sum(map(volume, held[name])) == torch.Size(shape).numel()
        for name, shape in shapes.items()
    )


def _disjoint(boxes: list[Box]) -> bool:
    """No two boxes share an element."""
    boxes = sorted(boxes)
    for number, a in enumerate(boxes):
        for b in boxes[number + 1 :]:
            if b[0][0] >= a[0][1]:
                break  # sorted by first row: no later one can overlap either
            if all(max(x[0], y[0]) < min(x[1], y[1]) for x, y in zip(a, b, strict=True)):
                return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--work", type=Path, help="where the sparse folders go; default: a temporary folder")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        for name in args.models:
            config, parameters, layouts = MODELS[name]
            nbytes = write_sparse(Path(work) / name, config)
            for layout in layouts:
                label = " ".join(f"{kind}{size}" for kind, size in zip(("TP", "PP", "EP"), layout, strict=False))
                row = {"model": name, "layout": label, "gb": round(nbytes / 1e9, 1)}
                row |= plan(Path(work) / name, *layout) | {"holds": holds(config, *layout)}
                row["parameters_as_published"] = nbytes == 2 * parameters
                rows.append(row)
                print(json.dumps(row), flush=True)
    ok = all(row["holds"] and row["parameters_as_published"] for row in rows)
    within = all(row["seconds"] < LIMIT_SECONDS and row["peak_bytes"] < LIMIT_BYTES for row in rows)
    print(json.dumps({"benchmark": "real_shapes", "rows": rows, "ok": ok, "within_limits": within}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
