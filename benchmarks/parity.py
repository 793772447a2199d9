"""Logits against transformers, and HF -> Megatron -> HF bit for bit, under several layouts.

    python benchmarks/parity.py [--quick]

Compares in fp32 the logits of two texts packed in one row with those transformers computes for each text alone.
The real SmolLM2-135M-Instruct runs at TP 1 and 3, PP 1 and 2, with and without sequence parallelism; small random
models of every family cover TP 2 and 4, tied and untied heads, Llama 3's rope scaling, sliding windows (in all layers
and in some), QKV biases, q/k norms, odd vocabulary sizes, fewer key/value heads than ranks, and the rotary positions of
yarn, dynamic and longrope. `--quick` leaves the real model out. The last line printed is one JSON object; exit status 1
when a check fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusemega.hf.folder import HFFolder

TOLERANCE = 1e-4
ROOT = Path(__file__).resolve().parents[1]

_ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_TINY_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
_TINY: dict[str, dict[str, Any]] = {
    "tiny-mha-untied": {"vocab_size": 263, "num_attention_heads": 4},
    "tiny-gqa-tied": {"vocab_size": 509, "num_attention_heads": 8, "tie_word_embeddings": True},
    "tiny-llama3-rope": {"vocab_size": 258, "num_attention_heads": 8, "rope_parameters": _ROPE_LLAMA3},
    "tiny-head-dim": {"vocab_size": 251, "num_attention_heads": 4, "head_dim": 24},
    "tiny-mistral": {"model_type": "mistral", "vocab_size": 257, "num_attention_heads": 8, "sliding_window": 16},
    "tiny-qwen2": {"model_type": "qwen2", "vocab_size": 263, "num_attention_heads": 8, "tie_word_embeddings": True},
    "tiny-qwen2-window": {
        "model_type": "qwen2",
        "vocab_size": 258,
        "num_attention_heads": 4,
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 2,
    },
    "tiny-qwen3": {"model_type": "qwen3", "vocab_size": 251, "num_attention_heads": 8, "head_dim": 24},
    "tiny-one-kv-head": {"vocab_size": 263, "num_attention_heads": 8, "num_key_value_heads": 1},
    "tiny-qwen2-yarn": {
        "model_type": "qwen2",
        "vocab_size": 257,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
    },
    "tiny-dynamic-rope": {
        "vocab_size": 251,
        "num_attention_heads": 8,
        "max_position_embeddings": 24,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    },
    "tiny-phi3": {
        "model_type": "phi3",
        "vocab_size": 258,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 16,
        "pad_token_id": 0,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 24,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [1.0, 1.5, 2.0, 3.0, 6.0, 12.0],
        },
    },
    "tiny-gemma2": {
        "model_type": "gemma2",
        "vocab_size": 257,
        "num_attention_heads": 8,
        "head_dim": 24,
        "sliding_window": 16,
        "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
    "tiny-gemma3": {
        "model_type": "gemma3_text",
        "vocab_size": 262,
        "num_attention_heads": 8,
        "head_dim": 16,
        "sliding_window": 16,
        "sliding_window_pattern": 3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
}
# (TP, PP, sequence parallel); what is left of the world is data parallel.
_TINY_LAYOUTS = [(1, 1, False), (2, 1, False), (2, 1, True), (4, 1, True), (1, 2, False), (1, 4, False), (2, 2, True)]
_REAL_LAYOUTS = [(1, 1, False), (3, 1, False), (3, 1, True), (1, 2, False), (3, 2, True)]
_TEXTS = (
    "The tower is 324 metres tall, about the same height as an 81-storey building, and the tallest structure in Paris.",
    "def add(a, b):\n    return a + b\n",
)


def prepare(work: Path, quick: bool) -> dict[str, int]:
    """Folders and reference logits of every model; returns how many processes each one is to run on."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    worlds = {}
    for name, settings in _TINY.items():
        config = AutoConfig.for_model(**({"model_type": "llama"} | _TINY_SHAPE | settings))
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():  # norms other than 1, biases other than 0, logits of a trained model's size
            for key, parameter in model.named_parameters():
                # Gemma's norms scale by 1 + weight.
                centre = key.endswith("norm.weight") and "gemma" not in name
                vector = 0.2 * torch.randn_like(parameter) + centre
                parameter.copy_(vector if parameter.dim() == 1 else 6 * parameter)
        model.save_pretrained(work / name, max_shard_size="100KB")
        texts = [torch.randint(0, config.vocab_size, (n,)).tolist() for n in (45, 19)]
        _reference(work, name, model, texts)
        worlds[name] = 4
    if not quick:
        from fusemega.fixtures import data as assets

        folder = assets.smollm2()
        (work / "smollm2-135m").symlink_to(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = [tokenizer(text)["input_ids"] for text in _TEXTS]
        texts[1] = texts[1][: len(texts[1]) - (len(texts[0]) + len(texts[1])) % 3]  # sequence parallelism over 3
        _reference(work, "smollm2-135m", AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), texts)
        worlds["smollm2-135m"] = 6
    return worlds


def _reference(work: Path, name: str, model: Any, texts: list[list[int]]) -> None:
    """Logits of transformers in fp32, and how far they are from its own in fp64."""
    import torch

    def logits() -> Any:
        with torch.no_grad():
            return torch.cat([model(torch.tensor([text])).logits[0] for text in texts])

    torch.set_num_threads(1)  # as the workers: the number of threads changes the order of sums
    model.eval()
    logits_SV = logits()
    model.double()
    error = float((logits() - logits_SV).abs().max())
    largest = float(logits_SV.abs().max())
    reference = {"texts": texts, "logits_SV": logits_SV, "transformers_fp32_error": error, "max_abs_logit": largest}
    torch.save(reference, work / f"{name}.reference.pt")


def worker(work: Path, names: list[str]) -> None:
    """Every layout of every model, on this rank; the main process writes what came out."""
    import torch
    import torch.distributed as dist

    from fusemega.hf.export import export_hf
    from fusemega.hf.folder import HFFolder
    from fusemega.hf.load import load_hf
    from fusemega.models.build import build_model
    from fusemega.models.dense_logits import dense_logits
    from fusemega.runtime.parallel import ParallelConfig, initialize, shutdown

    results = []
    layouts = _REAL_LAYOUTS if "smollm2-135m" in names else _TINY_LAYOUTS
    for tp, pp, sequence_parallel in layouts:
        sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
        world = initialize(ParallelConfig(**sizes, sequence_parallel=sequence_parallel))
        for name in names:
            reference = torch.load(work / f"{name}.reference.pt")
            model = build_model(HFFolder(work / name).architecture, world, torch.float32)
            load_hf(model, work / name, world)
            logits_SV = dense_logits(model, world, reference["texts"])
            difference = 0.0 if logits_SV is None else float((logits_SV.cpu() - reference["logits_SV"]).abs().max())
            if logits_SV is not None and not torch.isfinite(logits_SV).all():
                difference = float("inf")
            everyone: list[float] = [0.0] * world.world_size
            dist.all_gather_object(everyone, difference)
            label = f"TP{tp} PP{pp}{' SP' if sequence_parallel else ''} DP{world.dp_size}"
            out = work / f"{name}.{label.replace(' ', '-')}"
            export_hf(model, out, work / name, world)
            if world.is_main:
                different = different_tensors(HFFolder(work / name), HFFolder(out))
                row = {"model": name, "layout": label, "max_logit_difference": max(everyone)}
                row |= {key: reference[key] for key in ("max_abs_logit", "transformers_fp32_error")}
                results.append(row | {"tensors": len(list(HFFolder(out))), "different_tensors": different})
                shown = f"max |dlogit| {max(everyone):.2e}  {len(different)} tensors differ"
                print(f"{name:18} {label:14} {shown}", flush=True)
            world.barrier()
    if int(os.environ["RANK"]) == 0:
        (work / f"results.{names[0]}.json").write_text(json.dumps(results))
    shutdown()


def different_tensors(ours: HFFolder, theirs: HFFolder) -> list[str]:
    """Names that only one folder has, or whose type, shape or any bit differs."""
    import torch

    from fusemega.files.boxes import whole

    different = sorted(set(ours) ^ set(theirs))
    for name in set(ours) & set(theirs):
        a, b = (folder.read(name, whole(folder.shape(name))) for folder in (ours, theirs))
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            different.append(name)
    return different


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small random models only")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(Path(args.worker[0]), args.worker[1].split(","))
        return 0
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        worlds = prepare(work, args.quick)
        results: list[dict[str, Any]] = []
        for nproc in sorted(set(worlds.values())):
            names = [name for name, world in worlds.items() if world == nproc]
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
            command += [str(Path(__file__).resolve()), "--worker", str(work), ",".join(names)]
            path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
            subprocess.run(command, check=True, env=env)
            results += json.loads((work / f"results.{names[0]}.json").read_text())
    worst = max(row["max_logit_difference"] for row in results)
    bitwise = not any(row["different_tensors"] for row in results)
    summary = {
        "benchmark": "parity",
        "quick": args.quick,
        "tolerance": TOLERANCE,
        "max_logit_difference": worst,
        "round_trip_bitwise": bitwise,
        "cases": results,
        "ok": bool(worst <= TOLERANCE and bitwise),
    }
    print(json.dumps(summary))
    return 0 if summary["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
