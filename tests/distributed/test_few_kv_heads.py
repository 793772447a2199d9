"""More tensor-parallel ranks than key/value heads: the curve of one process, also after a resume in another layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import tiny
from fusemega.config import validate
from fusemega.convert.convert import export_megatron
from fusemega.files.boxes import whole
from fusemega.fixtures import data as assets
from fusemega.hf.folder import HFFolder
from fusemega.training.assembly import open_trainer
from fusemega.training.run_file import TrainRun
from tests.distributed.launch import run_ranks
from tests.distributed.test_expert_training import near

TP2, TP4 = ({"tensor_model_parallel_size": size} for size in (2, 4))
LAYOUTS: dict[str, dict[str, Any]] = {
    "sft, TP4": TP4,  # two ranks for a key/value head
    "sft, TP2xDP2": TP2,
    "sft, TP4 SP": TP4 | {"sequence_parallel": True},
}


def section(work: Path, name: str, parallel: dict[str, Any]) -> dict[str, Any]:
    return {
        "output_dir": str(work / "runs" / name),
        "model": {"load": str(work / "model"), "dtype": "fp32"},
        "parallel": parallel,
        "data": {"path": str(work / "chat.jsonl"), "seq_length": 256},
        "objective": {"name": "sft"},
        "optimizer": {"lr": 2e-3, "weight_decay": 0.1},
        "training": {"train_iters": 4, "global_batch_size": 4, "export_hf": False},
    }


def test_curves_and_resumed_curves(tmp_path: Path, chat_files: assets.ChatData) -> None:
    chat = tiny.write_chat(tmp_path / "chat.jsonl", rows=16, characters=120)
    sizes: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2}
    tiny.write_model(tmp_path / "model", chat, model_type="qwen2", hidden_size=32, intermediate_size=48, **sizes)
    cases = {name: section(tmp_path, name, parallel) for name, parallel in LAYOUTS.items()}
    (tmp_path / "cases.json").write_text(json.dumps({"cases": cases}))
    first, *others = run_ranks("expert_training.py", 4, str(tmp_path / "cases.json"))
    assert all(other == first for other in others)
    trainer, _ = open_trainer(validate(TrainRun, section(tmp_path, "alone", {}), "alone"))
    alone = [trainer.step() for _ in range(2)]
    trainer.save()
    alone += [trainer.step() for _ in range(2)]
    for name in LAYOUTS:
        near(first[name], alone, ["lm loss"], name)
    moves = [name for name in first if ", then " in name]
    assert moves == ["sft, TP4, then sft, TP2xDP2", "sft, TP2xDP2, then sft, TP4 SP"]
    for move in moves:
        near(first[move], alone[2:], ["lm loss"], move)
    # The checkpoints of step 2 have the same weights.
    export_megatron(tmp_path / "runs/alone", tmp_path / "alone-hf", iteration=2)
    wanted = HFFolder(tmp_path / "alone-hf")
    export_megatron(tmp_path / "runs/sft, TP4", tmp_path / "TP4-hf", iteration=2)
    found = HFFolder(tmp_path / "TP4-hf")
    assert set(found) == set(wanted)
    for key in wanted:
        a, b = (folder.read(key, whole(folder.shape(key))) for folder in (wanted, found))
        assert float((a - b).norm()) <= 2e-5 * float(a.norm()), key
