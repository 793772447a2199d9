"""The quickstart on tiny models: several seeds, on two processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tiny
from fusemega.fixtures import data as assets
from fusemega.recipes import arms, quickstart
from fusemega.recipes.arms import Scale


@pytest.fixture
def kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Text of each kind, made from chat: this test asks for numbers, not for what they say."""
    chat = tiny.write_chat(tmp_path / "chat.jsonl", rows=8, characters=200)
    texts = [" ".join(m["content"] for m in json.loads(line)["messages"]) for line in chat.read_text().splitlines()]
    held_out = tmp_path / "texts.jsonl"
    held_out.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.setattr(assets, "domain_data", lambda kind: assets.DomainData(held_out, held_out))
    return chat


def test_each_seed_is_trained_and_told(
    kinds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat_files: assets.ChatData
) -> None:
    scale = Scale(1_500, 600, global_batch_size=4, passes=1, train_iters=2, seeds=2, answer_tokens=4)
    monkeypatch.setitem(arms.SCALES, "full", scale)
    for name, seed in (("teacher", 1), ("target", 2)):
        tiny.write_model(tmp_path / name, kinds, seed=seed)
    options = ["--full", "--nproc", "2", "--out", str(tmp_path / "out"), "--lr", "0.01"]
    options += ["--train", str(kinds), "--held-out", str(kinds)]
    options += ["--teacher", str(tmp_path / "teacher"), "--target", str(tmp_path / "target")]
    monkeypatch.setattr("sys.argv", ["quickstart", *options])
    quickstart.main()
    summary: dict[str, Any] = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["layout"]["processes"], summary["seeds"]) == (2, 2)
    for name, of in summary["measures"].items():
        for kind in ("chat", *assets.DOMAINS):
            for values in of[kind].values():
                assert len(values) == (2 if name in ("control", "fused") else 1)
            assert (len(set(of[kind]["kl"])) == 2) == (name in ("control", "fused")), "another order, another model"
    assert "(2 seeds; on " in summary["seen"]
    assert (tmp_path / "out" / "fused-2" / "hf" / "config.json").exists()
