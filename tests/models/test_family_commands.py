"""Each command on a tiny model of each newer family: what it makes is read again, or it is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks import tiny
from fusemega import cli
from fusemega.config import validate
from fusemega.fixtures import data as assets
from fusemega.hf.folder import HFFolder
from fusemega.hf.load import load_hf
from fusemega.models.build import build_model
from fusemega.models.dense_logits import dense_logits
from fusemega.runtime.parallel import ParallelConfig, initialize
from fusemega.training.assembly import open_trainer
from fusemega.training.run_file import TrainRun
from tests.models.internlm2 import write_internlm2

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "initializer_range": 0.15}
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 8, "sliding_window": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 8, "sliding_window": 16, "sliding_window_pattern": 2},
    "phi3": {"sliding_window": 16, "tie_word_embeddings": False},
    "internlm2": {"model_type": "llama", "tie_word_embeddings": False},  # computed by a Llama
    "mixtral": {"num_local_experts": 4, "tie_word_embeddings": False},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    | {"mlp_only_layers": [1], "tie_word_embeddings": False},
}
MORE = ("gemma3_text", "qwen3_moe")  # much like two others
EACH = [pytest.param(name, marks=pytest.mark.full) if name in MORE else name for name in FAMILIES]
TEXT = list(range(1, 20))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, chat_files: assets.ChatData) -> Path:
    """Conversations, pairs, and of each family the models NAME, NAME-1, NAME-2, and NAME-small of another tokenizer."""
    work = tmp_path_factory.mktemp("commands")
    chat = tiny.write_chat(work / "chat.jsonl", rows=8, characters=60)
    turns = [json.loads(line)["messages"] for line in chat.read_text().splitlines()]
    pairs = [
        {"prompt": turn[:1], "chosen": turn[1:2], "rejected": turns[number - 1][1:2]}
        for number, turn in enumerate(turns)
    ]
    (work / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return work


@pytest.fixture
def model(work: Path) -> Callable[..., Path]:
    """`model(family, seed, vocab_size)`: its folder, made once."""

    def make(family: str, seed: int = 0, vocab_size: int = 400) -> Path:
        folder = work / f"{family}-{seed}-{vocab_size}"
        if not folder.exists():
            settings = {"model_type": family, **SIZES, **FAMILIES[family]}
            tiny.write_model(folder, work / "chat.jsonl", seed=seed, vocab_size=vocab_size, **settings)
            if family == "internlm2":
                llama = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
                for name in ("config.json", "generation_config.json", "model.safetensors"):
                    (folder / name).unlink()
                write_internlm2(folder, llama)
        return folder

    return make


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`run("prune search", RUN_FILE or word, ...)`: runs a command; returns its one line of error, or ""."""

    def command(words: str, *args: Any) -> str:
        given = []
        for number, arg in enumerate(args):
            if isinstance(arg, dict):
                path = tmp_path / f"{words.replace(' ', '-')}-{number}.yaml"
                path.write_text(yaml.safe_dump(arg))
                arg = path
            given.append(str(arg))
        capsys.readouterr()
        try:
            cli.main([*words.split(), *given])
        except SystemExit as end:
            if end.code not in (None, 0):
                assert end.code == 2
                (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
                return line
        return ""

    return command


def read_again(folder: Path) -> None:
    """The folder is read here, and by transformers if it has the class; both compute the same."""
    world = initialize(ParallelConfig())
    ours = build_model(HFFolder(folder).architecture, world, torch.float32)
    load_hf(ours, folder, world)
    logits_SV = dense_logits(ours, world, [TEXT])
    assert logits_SV is not None and logits_SV.isfinite().all() and logits_SV.std() > 0.1
    if HFFolder(folder).config["model_type"] != "internlm2":
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(theirs(torch.tensor([TEXT])).logits[0], logits_SV, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", EACH)
def test_transplant_and_merge(family: str, model: Any, run: Any, tmp_path: Path) -> None:
    assert not run("transplant", model(family), tmp_path / "moved", "--tokenizer", model(family, 3, 300))
    read_again(tmp_path / "moved")
    assert HFFolder(tmp_path / "moved").architecture.vocab_size == 300
    base, one, two = (str(model(family, seed)) for seed in range(3))
    for method, parameters in (("linear", {"weight": 0.5}), ("sce", {}), ("ties", {"weight": 0.5, "density": 0.5})):
        models = [{"model": folder, "parameters": parameters} for folder in (one, two)]
        plan: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "float32"}
        if method != "linear":
            plan["base_model"] = base
        assert not run("merge", plan, tmp_path / method)
        read_again(tmp_path / method)
    plan = {"merge_method": "slerp", "base_model": one, "models": [{"model": two}], "parameters": {"t": 0.3}}
    assert not run("merge", plan, tmp_path / "slerp")
    read_again(tmp_path / "slerp")


NO_REMOTE = {
    "phi3": "no class for model_type 'phi3'",
    "internlm2": "no class for model_type 'internlm2'",
    "mixtral": "no experts, which mixtral has",
    "qwen3_moe": "no experts, which qwen3_moe has",
}
NO_NEMOTRON = {
    "gemma2": ("no second norm around a block", "remote-code"),
    "gemma3_text": ("no norms on queries and keys", "remote-code"),
    "phi3": ("no weights in the form of this family", "plain"),
    "internlm2": ("no weights in the form of this family", "plain"),
    "mixtral": ("no experts", "plain"),
    "qwen3_moe": ("no experts", "plain"),
}


@pytest.mark.parametrize("family", EACH)
def test_a_search_for_blocks_and_what_it_removes(family: str, model: Any, run: Any, work: Path, tmp_path: Path) -> None:
    search = {
        "model": {"load": str(model(family)), "dtype": "fp32"},
        "data": {"path": str(work / "chat.jsonl"), "seq_length": 64, "limit": 2},
        "windows": "rows",
        "blocks": 2,
        "constraint": "plain",
        "search": {"name": "exact"},
        "output": str(tmp_path / "search"),
    }
    assert not run("prune search", search)
    order = tmp_path / "search" / "order.json"

    def apply(form: str) -> str:
        line: str = run("prune apply", model(family), order, tmp_path / form, "--export", form)
        return line

    assert not apply("plain")
    read_again(tmp_path / "plain")
    line = apply("remote-code")
    if family in NO_REMOTE:
        assert f"the form remote-code has {NO_REMOTE[family]}" in line and line.endswith("allowed: plain")
    else:
        assert not line and HFFolder(tmp_path / "remote-code").config["model_type"] == f"pruned_{family}"
    reason, allowed = NO_NEMOTRON[family]
    line = apply("nemotron-nas")
    assert f"the form nemotron-nas has {reason}" in line and line.endswith(f"allowed: {allowed}")


@pytest.mark.parametrize("family", EACH)
def test_a_run_goes_on_with_the_same_bits(family: str, model: Any, run: Any, work: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "output_dir": str(tmp_path / "whole"),
        "model": {"load": str(model(family)), "dtype": "fp32"},
        "data": {"path": str(work / "chat.jsonl"), "seq_length": 64},
        "objective": {"name": "sft"},
        "optimizer": {"lr": 1e-3},
        "training": {"train_iters": 2, "global_batch_size": 2},
    }
    assert not run("train", settings)
    read_again(tmp_path / "whole/hf")
    settings["output_dir"] = str(tmp_path / "parts")
    trainer, _ = open_trainer(validate(TrainRun, settings, "test"))
    trainer.step()
    trainer.save()
    assert not run("train", settings)
    assert HFFolder(tmp_path / "parts/hf").content_hash() == HFFolder(tmp_path / "whole/hf").content_hash()


@pytest.mark.parametrize("family", EACH)
def test_a_reward_model_scores(family: str, model: Any, run: Any, work: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "output_dir": str(tmp_path / "reward"),
        "model": {"load": str(model(family)), "dtype": "fp32"},
        "data": {"path": str(work / "pairs.jsonl"), "seq_length": 256},
        "objective": {"name": "reward"},
        "optimizer": {"lr": 1e-3},
        "training": {"train_iters": 1, "global_batch_size": 2},
    }
    line = run("train", settings)
    if family == "internlm2":
        assert line.endswith("a reward model cannot be made of it: internlm2 has no class with a score")
        assert not (tmp_path / "reward").exists()
        return
    assert not line
    data = {"path": str(work / "pairs.jsonl"), "seq_length": 128}
    scoring = {"model": {"load": str(tmp_path / "reward/hf"), "dtype": "fp32"}, "data": data}
    assert not run("score", scoring | {"output": str(tmp_path / "scored.jsonl")})
    rows = [json.loads(text) for text in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and all(len(row["rewards"]) == 2 for row in rows)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward/hf", dtype=torch.float32)
    assert theirs.num_labels == 1


@pytest.mark.parametrize("family", EACH)
def test_a_conversion_there_and_back(family: str, model: Any, run: Any, tmp_path: Path) -> None:
    assert not run("convert import", model(family), tmp_path / "megatron")
    assert not run("convert export", tmp_path / "megatron", tmp_path / "back")
    assert HFFolder(tmp_path / "back").content_hash() == HFFolder(model(family)).content_hash()
    shutil.rmtree(tmp_path / "megatron")
