"""The same merges by fusemega and by mergekit: equal within bf16 rounding but for ties (`merge_compare.py`), time and
peak memory side by side.

    python benchmarks/merge_vs_mergekit.py [--models 2 4 8] [--size 135m 500m] [--methods ...] [--mergekit PYTHON]

mergekit's released package is installed from PyPI into an environment of its own (`--mergekit` gives the Python of one
that exists). `135m` are variants of SmolLM2-135M-Instruct made by adding noise of an rms of 3e-4 to 3e-3, `500m` the
same of a random Llama of 0.5 billion parameters. Both tools get the same YAML file, one after the other;
`dtype: float32, out_dtype: bfloat16` lets mergekit compute in fp32 as fusemega always does. Time is of the whole
command; processor seconds are beside it, for a machine that is not idle. Start-up (importing what a merge needs;
`mergekit-yaml --help`) is shown apart, and left out of `speedup_work`. fusemega's time includes bringing its files to
the disk (fsync), which mergekit does not do. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
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
import yaml
from merge_compare import compare
from safetensors import safe_open
from safetensors.torch import save_file

from fusemega.fixtures.data import smollm2

MERGEKIT = "mergekit==0.1.5"
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.2},
    "slerp": {"t": 0.4},
    "task_arithmetic": {"weight": 0.3},
    "ties": {"weight": 0.2, "density": 0.6},
    "sce_mergekit": {"select_topk": 0.1},
}
TARGETS = {"ties": 5.0, "sce_mergekit": 5.0}  # the others 1.5; memory 1/3


def mergekit_python(given: str | None, folder: Path) -> str:
    """A Python that has mergekit; installed on first use."""
    if given:
        return given
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, f"torch=={torch.__version__.split('+')[0]}", "numpy"], check=True)
        subprocess.run([*pip, MERGEKIT], check=True)
    return str(python)


def write_variants(size: str, count: int, folder: Path) -> tuple[Path, list[Path]]:
    """A base and `count` variants, written tensor by tensor where they are not there yet."""
    base = smollm2() if size == "135m" else folder / "base"
    if size == "500m" and not base.exists():
        _random_llama(base)
    with safe_open(base / "model.safetensors", framework="pt") as file:
        for number in range(count):
            variant = folder / f"variant{number}"
            if variant.exists():
                continue
            generator = torch.Generator().manual_seed(number)
            rms = 3e-4 * 10 ** (number / 7)
            tensors = {}
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                value = file.get_tensor(name)
                noise = torch.randn(value.shape, generator=generator).mul_(rms)
                tensors[name] = noise.add_(value).to(value.dtype)
            shutil.copytree(base, variant, ignore=shutil.ignore_patterns("*.safetensors"))
            save_file(tensors, variant / "model.safetensors", metadata={"format": "pt"})
    return base, [folder / f"variant{number}" for number in range(count)]


def _random_llama(folder: Path) -> None:
    """494 million parameters: 24 layers of width 896 and a vocabulary of 151,936, tied."""
    sizes = {"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    heads = {"num_attention_heads": 14, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
    config: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes, **heads}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (151_936, 896), "model.norm.weight": (896,)}
    for layer in range(24):
        at = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{at}.{norm}.weight"] = (896,)
        for name, rows in (("q", 896), ("k", 128), ("v", 128), ("o", 896)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (rows, 896)
        shapes[f"{at}.mlp.gate_proj.weight"] = shapes[f"{at}.mlp.up_proj.weight"] = (4864, 896)
        shapes[f"{at}.mlp.down_proj.weight"] = (896, 4864)
    generator = torch.Generator().manual_seed(99)
    tensors = {
        name: torch.randn(shape, generator=generator).mul_(0.02).to(torch.bfloat16) for name, shape in shapes.items()
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))


def measured(command: list[str], log: Path) -> tuple[float, float, float]:
    """(seconds, peak GB, processor seconds) of a command and its children.

    Memory is the proportional set size of all of them together, seen ten times a second: what forked processes share
    counts once.
    """
    peak = 0
    begun = seen = time.monotonic()
    with log.open("ab") as errors:
        process = subprocess.Popen(command, stdout=errors, stderr=errors)
    while True:
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            break
        if time.monotonic() - seen > 0.1:
            peak = max(peak, sum(_memory(pid) for pid in _family(process.pid)))
            seen = time.monotonic()
        time.sleep(0.005)
    seconds = time.monotonic() - begun
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return seconds, peak / 1e9, usage.ru_utime + usage.ru_stime


def _family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text()
            found += map(int, children.split())
    return found


def _memory(pid: int) -> int:
    """Bytes of its proportional set size; 0 where it has ended."""
    with contextlib.suppress(OSError):
        rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next((int(row.split()[1]) * 1024 for row in rows if row.startswith("Pss:")), 0)
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--size", nargs="+", default=["135m", "500m"], choices=["135m", "500m"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--mergekit", help="the Python of an environment that has mergekit")
    parser.add_argument("--work", type=Path, help="where models and results go; by default a temporary folder")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="fusemega-merge-"))
    work.mkdir(parents=True, exist_ok=True)
    python = mergekit_python(args.mergekit, work / "mergekit")
    mergekit = [str(Path(python).with_name("mergekit-yaml"))]
    fusemega = [
        sys.executable,
        "-m",
        "fusemega",
        "merge",
        "--vocabulary",
        "position",
    ]  # the random model has no tokenizer
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    log = work / "log"
    measured([*fusemega, "--help"], log), measured([*mergekit, "--help"], log)  # the page cache is warm from here on
    start = {"fusemega": measured([sys.executable, "-c", "import torch, fusemega.cli.merge"], log)[0]}
    start["mergekit"] = measured([*mergekit, "--help"], log)[0]
    rows = []
    for size in args.size:
        folder = work / size
        base, variants = write_variants(size, max(args.models), folder)
        for method in args.methods:
            for count in args.models if method != "slerp" else args.models[:1]:
                models = variants[: 1 if method == "slerp" else count]
                row = one(method, size, base, models, work, fusemega, mergekit, start, log)
                rows.append(row | {"models": len(models)})
                print(json.dumps(rows[-1]), flush=True)
    met = all(row["meets"] for row in rows)
    load = os.getloadavg()[0]
    result = {"benchmark": "merge_vs_mergekit", "cores": len(os.sched_getaffinity(0)), "load_at_end": load}
    print(json.dumps(result | {"startup_s": start, "rows": rows, "all_targets_met": met}))


def one(
    method: str,
    size: str,
    base: Path,
    models: list[Path],
    work: Path,
    fusemega: list[str],
    mergekit: list[str],
    start: dict[str, float],
    log: Path,
) -> dict[str, Any]:
    """One method, one number of models: both tools, and the comparison."""
    settings = dict(METHODS[method])
    shared = {"normalize": False} if method == "task_arithmetic" else {}
    each = {key: settings.pop(key) for key in ("weight", "density") if key in settings}
    run: dict[str, Any] = {
        "merge_method": "sce" if method == "sce_mergekit" else method,
        "base_model": str(base),
        "models": [{"model": str(model), "parameters": each} for model in models],
        "parameters": settings | shared,
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    if method == "linear":
        del run["base_model"]
    file = work / "merge.yaml"
    file.write_text(yaml.safe_dump(run))
    row: dict[str, Any] = {"method": method, "size": size}
    for tool, command in (
        ("fusemega", [*fusemega, str(file), str(work / "fusemega.out"), f"merge_method={method}"]),
        ("mergekit", [*mergekit, str(file), str(work / "mergekit.out"), "--quiet"]),
    ):
        for left in (work / f"{tool}.out", work / f".{tool}.out.incomplete"):  # by a run that was stopped
            shutil.rmtree(left, ignore_errors=True)
        seconds, memory, processor = measured(command, log)
        row[tool] = {"seconds": round(seconds, 2), "of_which_start": round(start[tool], 2)}
        row[tool] |= {"processor_seconds": round(processor, 2), "peak_gb": round(memory, 3)}
    setting = float(METHODS[method].get("density", METHODS[method].get("select_topk", 1)))
    row |= compare(work / "fusemega.out", work / "mergekit.out", base, models, method, setting)
    ours, theirs = row["fusemega"], row["mergekit"]
    row["speedup_whole"] = round(theirs["seconds"] / ours["seconds"], 2)
    row["speedup_work"] = round((theirs["seconds"] - start["mergekit"]) / (ours["seconds"] - start["fusemega"]), 2)
    row["memory_ratio"] = round(ours["peak_gb"] / theirs["peak_gb"], 3)
    equal = row["unexplained"] == 0
    row["meets"] = row["speedup_whole"] >= TARGETS.get(method, 1.5) and row["memory_ratio"] <= 1 / 3 and equal
    return row


if __name__ == "__main__":
    main()
