"""A folder with tiny models and texts, a run file and a recipe; Slurm as a script in PATH."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import tiny
from tests.cluster.fake_slurm import FakeSlurm

TRAIN: dict[str, Any] = {
    "output_dir": "run",
    "model": {"load": "target", "dtype": "fp32"},
    "data": {"path": "data.jsonl", "seq_length": 64},
    "objective": {"name": "sft"},
    "optimizer": {"lr": 1e-3},
    "training": {"train_iters": 6, "global_batch_size": 4, "save_interval": 2, "export_hf": False},
}
RECIPE: dict[str, Any] = {
    "output_dir": "out",
    "nproc": 2,
    "target": "target",
    "sources": {"alike": "alike", "other": "other"},
    "model": {"dtype": "fp32"},
    "data": "data.jsonl",
    "held_out": "data.jsonl",
    "optimizer": {"lr": 1e-3},
    "training": {"train_iters": 1, "global_batch_size": 2},
    "merge": {"merge_method": "linear"},
}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_inputs(folder)
    return folder


def write_inputs(folder: Path) -> None:
    """A target, a source of its tokenizer, one of another, and the files that name them."""
    data = tiny.write_chat(folder / "data.jsonl", rows=8, characters=60)
    for name, size in (("target", 300), ("alike", 300), ("other", 280)):
        tiny.write_model(
            folder / name, data, vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=1
        )
    (folder / "train.yaml").write_text(yaml.safe_dump(TRAIN))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a copy of these files."""
    folder = tmp_path / "place"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FUSEMEGA_CACHE", str(made / "cache"))
    for name in ("FUSEMEGA_SITE", "NPROC_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """In front of PATH."""
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{fake.bin}:{Path('/usr/bin')}:/bin")
    return fake
