"""A tiny model on real text, and run files for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tiny
from fusemega.config import validate
from fusemega.fixtures import data as assets
from fusemega.training.run_file import TrainRun


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory, chat_files: assets.ChatData) -> Path:
    """`chat.jsonl` and `model/`."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write_model(folder / "model", tiny.write_chat(folder / "chat.jsonl", rows=24, characters=200))
    return folder


@pytest.fixture
def make_run(work: Path, tmp_path: Path) -> Callable[..., TrainRun]:
    """`make_run(section={key: value})`: a valid run with those keys replaced; `output_dir` is `tmp_path/run`."""

    def make(**sections: Any) -> TrainRun:
        base: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "model": {"load": str(work / "model"), "dtype": "fp32"},
            "data": {"path": str(work / "chat.jsonl"), "seq_length": 128},
            "objective": {"name": "sft"},
            "optimizer": {"lr": 2e-3, "weight_decay": 0.1, "lr_warmup_fraction": 0.2},
            "training": {"train_iters": 4, "global_batch_size": 6, "export_hf": False},
        }
        for name, value in sections.items():
            base[name] = {**base.get(name, {}), **value} if isinstance(value, dict) and name != "objective" else value
        return validate(TrainRun, base, "test")

    return make
