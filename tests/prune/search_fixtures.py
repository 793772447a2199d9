"""A tiny model whose blocks matter, texts for it, and run files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tiny
from fusemega.config import validate
from fusemega.fixtures import data as assets
from fusemega.prune.run_file import PruneRun


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory, chat_files: assets.ChatData) -> Path:
    """`chat.jsonl`, `texts.jsonl` of the same texts, and `model/` of four layers."""
    folder = tmp_path_factory.mktemp("prune")
    chat = tiny.write_chat(folder / "chat.jsonl", rows=12, characters=120)
    tiny.write_model(folder / "model", chat, initializer_range=0.15)
    rows = [json.loads(line)["messages"] for line in chat.read_text(encoding="utf-8").splitlines()]
    texts = [json.dumps({"text": messages[-1]["content"]}) + "\n" for messages in rows]
    (folder / "texts.jsonl").write_text("".join(texts), encoding="utf-8")
    return folder


@pytest.fixture
def make_run(work: Path, tmp_path: Path) -> Callable[..., PruneRun]:
    """`make_run(key=value)`: a valid run with those keys replaced; sections are laid over. `output` is `tmp_path/out`,
    `out1`, ..., a new one each time."""
    made = 0

    def make(**keys: Any) -> PruneRun:
        nonlocal made
        base: dict[str, Any] = {
            "model": {"load": str(work / "model"), "dtype": "fp32"},
            "data": {"path": str(work / "texts.jsonl"), "seq_length": 40, "limit": 8},
            "blocks": 3,
            "output": str(tmp_path / f"out{made or ''}"),
        }
        made += 1
        for name, value in keys.items():
            base[name] = {**base.get(name, {}), **value} if isinstance(value, dict) else value
        return validate(PruneRun, base, "test")

    return make
