"""Models without some blocks under tensor and pipeline parallelism; stages get about as many parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tiny
from fusemega.config import validate
from fusemega.convert.verify import verify
from fusemega.prune.apply import apply_order
from fusemega.runtime.parallel import ParallelConfig, initialize
from fusemega.training.run_file import TrainRun
from tests.distributed.launch import run_ranks
from tests.distributed.workers.pruned import LAYOUTS, losses
from tests.prune.conftest import blocks, masked, order_of, save_model

# Four small layers, then a whole one: as many layers on each stage would be out of balance.
REMOVED = "mlp 0, mha 1, mlp 2, mlp 3"
FORMS = {"nemotron-nas": "llama", "remote-code": "qwen3"}
IDS = [5, 17, 3, 99, 42, 42, 7, 60]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    work = tmp_path_factory.mktemp("layouts")
    world = initialize(ParallelConfig())
    (work / "ids.json").write_text(json.dumps(IDS))
    for form, family in FORMS.items():
        save_model(work / family, family)
        apply_order(work / family, order_of(REMOVED), work / form, world, export=form)
    chat = tiny.write_chat(work / "chat.jsonl", rows=16, characters=60)
    tiny.write_model(work / "whole", chat, num_hidden_layers=5)
    apply_order(work / "whole", order_of(REMOVED), work / "trained", world, export="remote-code")
    training: dict[str, Any] = {
        "model": {"load": str(work / "trained"), "dtype": "fp32"},
        "data": {"path": str(chat), "seq_length": 64},
        "objective": {"name": "sft"},
        "optimizer": {"lr": 1e-2},
        "training": {"train_iters": 3, "global_batch_size": 4, "export_hf": False},
    }
    (work / "train.json").write_text(json.dumps(training))
    return work, run_ranks("pruned.py", 2, str(work), *FORMS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_logits_and_the_folder_that_comes_out(run: tuple[Path, list[dict[str, Any]]], form: str, layout: str) -> None:
    work, _ = run
    with torch.no_grad():
        wanted = masked(work / FORMS[form], blocks(REMOVED))(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(torch.load(work / f"{form}.{layout}.pt"), wanted, atol=2e-5, rtol=1e-5)
    assert verify(work / form, work / f"{form}.{layout}").identical


@pytest.mark.parametrize("form", FORMS)
def test_stages_hold_about_as_many_parameters(run: tuple[Path, list[dict[str, Any]]], form: str) -> None:
    _, ranks = run
    assert [rank[f"{form} PP2"] for rank in ranks] == [[0, 1, 2], [3, 4]]
    assert [rank[f"{form} PP2VPP2"] for rank in ranks] == [[0, 2, 3], [1, 4]]


def test_training_is_the_same_in_every_layout(run: tuple[Path, list[dict[str, Any]]]) -> None:
    work, ranks = run
    section = json.loads((work / "train.json").read_text()) | {"output_dir": str(work / "run-alone")}
    alone = losses(validate(TrainRun, section, "alone"))
    assert alone[2] < alone[0] - 0.1
    for layout in LAYOUTS:
        for rank in ranks:
            assert rank[f"{layout}, losses"] == pytest.approx(alone, abs=1e-5), layout
