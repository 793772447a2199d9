"""The curve of one process on three ranks (an odd data parallelism) and on eight (tensor x pipeline x data)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tiny
from fusemega.config import validate
from fusemega.fixtures import data as assets
from fusemega.training.assembly import open_trainer
from fusemega.training.run_file import TrainRun
from tests.distributed.launch import run_ranks

TP2_SP_PP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(("ranks", "parallel"), [(3, {}), (8, TP2_SP_PP2)])
def test_curve(ranks: int, parallel: dict[str, Any], tmp_path: Path, chat_files: assets.ChatData) -> None:
    chat = tiny.write_chat(tmp_path / "chat.jsonl", rows=24, characters=200)
    tiny.write_model(tmp_path / "model", chat)

    def section(name: str, parallel: dict[str, Any]) -> dict[str, Any]:
        return {
            "output_dir": str(tmp_path / name),
            "model": {"load": str(tmp_path / "model"), "dtype": "fp32"},
            "parallel": parallel,
            "data": {"path": str(chat), "seq_length": 128},
            "objective": {"name": "sft"},
            "optimizer": {"lr": 2e-3, "weight_decay": 0.1},
            "training": {"train_iters": 4, "global_batch_size": 6, "export_hf": False},
        }

    asked = {"cases": {"many": section("many", parallel)}, "resumed": ["many"]}
    (tmp_path / "cases.json").write_text(json.dumps(asked))
    found = run_ranks("training.py", ranks, str(tmp_path / "cases.json"))[0]
    trainer, _ = open_trainer(validate(TrainRun, section("one", {}), "one"))
    for row in found["many"]:
        wanted = trainer.step()
        assert row["lm loss"] == pytest.approx(wanted["lm loss"], rel=1e-5)
        assert row["grad-norm"] == pytest.approx(wanted["grad-norm"], rel=1e-4)
    assert found["many, resumed"] == found["many"][2:]
