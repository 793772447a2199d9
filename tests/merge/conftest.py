"""Small model folders to merge, and a merge in one call."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusemega.config import validate
from fusemega.merge.merge import Options, merge, opened
from fusemega.merge.run_file import MergeRun, from_mergekit
from fusemega.report.merge_page import merge_page

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 301,
    "hidden_size": 96,
    "intermediate_size": 130,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
Tensors = dict[str, torch.Tensor]


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, written out again."""
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    narrow = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            out[f"{at}.{name}.weight"] = (hidden,)
        for name, rows in (("q", hidden), ("k", narrow), ("v", narrow), ("o", hidden)):
            out[f"{at}.self_attn.{name}_proj.weight"] = (rows, hidden)
        out[f"{at}.mlp.gate_proj.weight"] = out[f"{at}.mlp.up_proj.weight"] = (ffn, hidden)
        out[f"{at}.mlp.down_proj.weight"] = (hidden, ffn)
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = (vocab, hidden)
    return out


def write_folder(folder: Path, tensors: Tensors, **config: Any) -> Path:
    """A Hugging Face folder of two shards."""
    folder.mkdir(parents=True)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name].contiguous() for name in part}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    return folder


def write_tokenizer(folder: Path, tokens: Sequence[str], added: Sequence[str] = ()) -> None:
    """A tokenizer.json of whole words."""
    ids = {token: i for i, token in enumerate(tokens)}
    extra = [
        {"id": len(tokens) + i, "content": token, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for i, token in enumerate(added)
    ]
    model = {"type": "WordLevel", "vocab": ids, "unk_token": tokens[0]}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": extra, "model": model}))


def base_tensors(seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Tensors:
    """Random weights of a trained model's size."""
    generator = torch.Generator().manual_seed(seed)
    wanted = shapes(CONFIG | config)
    return {name: (torch.randn(shape, generator=generator) * 0.3).to(dtype) for name, shape in wanted.items()}


def tuned(base: Tensors, seed: int, rms: float) -> Tensors:
    """The base after a change of that size, in the base's types; a tenth of the elements stay."""
    generator = torch.Generator().manual_seed(1000 + seed)
    out = {}
    for name, value in base.items():
        change = torch.randn(value.shape, generator=generator) * rms
        change *= torch.rand(value.shape, generator=generator) > 0.1
        out[name] = (value.float() + change).to(value.dtype)
    return out


@pytest.fixture
def real_family(tmp_path: Path) -> Callable[..., tuple[Path, list[Path]]]:
    """The same with weights and changes of real fine-tunes, of which each tensor takes as many as it needs."""

    def make(dtype: torch.dtype, **config: Any) -> tuple[Path, list[Path]]:
        pool = load_file(Path(__file__).parent / "data" / "real_deltas.safetensors")
        folders = []
        for name, values in pool.items():
            tensors, at = {}, 0
            for tensor, shape in shapes(CONFIG | config).items():
                places = torch.arange(at, at + torch.Size(shape).numel()) % len(values)
                tensors[tensor], at = values[places].view(shape).to(dtype), int(places[-1]) + 1
            folders.append(write_folder(tmp_path / f"real_{name}", tensors, **config))
        return folders[0], folders[1:]

    return make


@pytest.fixture
def family(tmp_path: Path) -> Callable[..., tuple[Path, list[Path]]]:
    """`family(rms=..., count=..., dtype=..., **config)`: a base's folder and those of its variants."""

    def make(
        rms: Sequence[float] = (1e-3, 3e-3, 2e-3), dtype: torch.dtype = torch.float32, **config: Any
    ) -> tuple[Path, list[Path]]:
        base = base_tensors(dtype=dtype, **config)
        folder = write_folder(tmp_path / "base", base, **config)
        return folder, [write_folder(tmp_path / f"m{j}", tuned(base, j, size), **config) for j, size in enumerate(rms)]

    return make


def run_merge(out: Path, options: Options | None = None, **run: Any) -> Path:
    """Merges; keyword arguments are the run file. Folders without a tokenizer go by position, as it says for them."""
    loads = [run.get("base_model"), *(entry["model"] for entry in run.get("models", []) if isinstance(entry, dict))]
    if not any(load and (Path(load) / "tokenizer.json").is_file() for load in loads):
        run = {"vocabulary": "position"} | run
    data, notes = from_mergekit(run, "test")
    parsed = validate(MergeRun, data, "test")
    with opened(parsed, out, "test", notes) as plan:
        merge(plan, out, options or Options(workers=2), progress=lambda count: None, page=merge_page)
    return out


def entries(models: Sequence[Path], **each: Sequence[Any]) -> list[dict[str, Any]]:
    """`models:` of a run file; `each` gives one value a model of a setting."""
    return [
        {"model": str(path), "parameters": {key: values[j] for key, values in each.items()}}
        for j, path in enumerate(models)
    ]


def read_all(folder: Path) -> Tensors:
    """Every tensor of a folder."""
    out: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        out |= load_file(file)
    return out
