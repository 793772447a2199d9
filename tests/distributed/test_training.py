"""Training on several ranks: the curve of one process, whatever the layout and the objective, also after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tiny
from fusemega import assets
from fusemega.config import validate
from fusemega.scoring.teach import TeachRun, teach
from fusemega.training.run import TrainRun
from fusemega.training.train import open_trainer
from tests.distributed.launch import run_ranks

TP2 = {"tensor_model_parallel_size": 2}
SP = {"sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
PP4 = {"pipeline_model_parallel_size": 4}
# name -> (parallel section, training section)
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "TP2+SP x PP2": (TP2 | SP | PP2, {}),
    "TP2 x DP2, micro-batch 2": (TP2, {"micro_batch_size": 2}),
    "PP4": (PP4, {}),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, chat_files: assets.ChatData) -> Path:
    """A tiny target, data, and the store of a tiny teacher."""
    folder = tmp_path_factory.mktemp("tiny")
    chat = tiny.write_chat(folder / "chat.jsonl", rows=24, characters=200)
    tiny.write_model(folder / "model", chat)
    tiny.write_model(folder / "teacher", chat, seed=1)
    section = {
        "model": {"load": str(folder / "teacher"), "dtype": "fp32"},
        "data": {"path": str(chat), "seq_length": 128},
        "store": str(folder / "store"),
    }
    teach(validate(TeachRun, section, "teach"))
    return folder


def section(work: Path, name: str, objective: dict[str, Any], parallel: Any, training: Any) -> dict[str, Any]:
    return {
        "output_dir": str(work / "runs" / name),
        "model": {"load": str(work / "model"), "dtype": "fp32"},
        "parallel": parallel,
        "data": {"path": str(work / "chat.jsonl"), "seq_length": 128},
        "objective": objective,
        "optimizer": {"lr": 2e-3, "weight_decay": 0.1, "lr_warmup_fraction": 0.2},
        "training": {"train_iters": 4, "global_batch_size": 6, "export_hf": False, **training},
    }


def test_curves_and_resumed_curves(work: Path) -> None:
    objectives = {
        "sft": {"name": "sft"},
        "distill": {"name": "distill", "store": str(work / "store"), "tail": "residual", "lambda": 0.3},
    }
    cases = {
        f"{objective}, {layout}": section(work, f"{objective} {layout}", settings, *LAYOUTS[layout])
        for objective, settings in objectives.items()
        for layout in LAYOUTS
    }
    (work / "cases.json").write_text(json.dumps(cases))
    ranks = run_ranks("training.py", 4, str(work / "cases.json"))
    curves = [{name: rows for name, rows in rank.items() if "last rows" not in name} for rank in ranks]
    assert curves[0] == curves[3]  # every rank has the metrics
    for objective, settings in objectives.items():
        run = validate(TrainRun, section(work, f"{objective} alone", settings, {}, {}), objective)
        trainer, _ = open_trainer(run)
        alone = [trainer.step() for _ in range(4)]
        losses = [name for name in alone[0] if name.endswith("loss")]
        assert len(losses) == (1 if objective == "sft" else 3)
        for layout in LAYOUTS:
            rows = ranks[0][f"{objective}, {layout}"]
            for row, wanted in zip(rows, alone, strict=True):
                for name in losses:
                    assert row[name] == pytest.approx(wanted[name], rel=1e-5), (objective, layout, name)
                assert row["grad-norm"] == pytest.approx(wanted["grad-norm"], rel=1e-4), (objective, layout)
            assert ranks[0][f"{objective}, {layout}, resumed"] == rows, "a resumed curve is bitwise the same"
    moves = [name for name in ranks[0] if ", then " in name and "last rows" not in name]
    assert len(moves) == 2 * (len(LAYOUTS) - 1)
    for move in moves:
        left, taken = move.split(", then ")
        for row, wanted in zip(ranks[0][move], ranks[0][left][2:], strict=True):
            for name in (key for key in row if key.endswith("loss")):
                assert row[name] == pytest.approx(wanted[name], rel=1e-5), (move, name)
            assert row["grad-norm"] == pytest.approx(wanted["grad-norm"], rel=1e-4), move
        padded = "TP2" in taken  # 509 rows make 510
        for rows in filter(None, (rank[f"{move}, last rows"] for rank in ranks)):
            assert rows.keys() == {"param", "exp_avg", "exp_avg_sq"}
            assert all((last == 0) == padded and before > 0 for before, last in rows.values()), (move, rows)
