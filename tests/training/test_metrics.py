"""What a run writes about itself: throughput and memory beside the losses, and W&B where it is asked for."""

from __future__ import annotations

import importlib.util
import math
import mmap
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from fusemega.checkpoint import saver as saver_module
from fusemega.config import validate
from fusemega.errors import UserError
from fusemega.runtime.memory import peak_memory
from fusemega.scoring.teach import TeachRun, teach
from fusemega.store import Store
from fusemega.training import checkpoints as checkpoints_module
from fusemega.training.assembly import open_trainer, train
from fusemega.training.metrics import _number
from fusemega.training.records import CPU_MEMORY, THROUGHPUT, TIME, read_metrics
from fusemega.training.run_file import TrainRun

MakeRun = Callable[..., TrainRun]


def test_peak_memory_counts_what_was_held_and_given_back() -> None:
    cpu = torch.device("cpu")
    slack = 4 << 20  # Linux keeps these counters a little late
    before, now = peak_memory(cpu), psutil.Process().memory_info().rss
    # More than was ever resident, and mapped: the C library might serve it from memory that it keeps.
    with mmap.mmap(-1, before - now + (64 << 20)) as held:
        held.write(b"1" * len(held))
        with_it = peak_memory(cpu)
    assert with_it >= before + (64 << 20) - slack
    assert peak_memory(cpu) >= with_it - slack


def test_rows_have_throughput_and_memory(make_run: MakeRun, tmp_path: Path) -> None:
    train(make_run(training={"train_iters": 2}))
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == 2
    for row in rows:
        assert row[THROUGHPUT] == pytest.approx(row["tokens"] / row[TIME])
        assert 50e6 < row[CPU_MEMORY] <= peak_memory(torch.device("cpu")) + (100 << 20)  # of the writers
    assert rows[1][CPU_MEMORY] >= rows[0][CPU_MEMORY]


def test_distillation_tells_how_probable_the_labels_are(
    make_run: MakeRun, work: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, data = {"load": str(work / "model"), "dtype": "fp32"}, {"path": str(work / "chat.jsonl"), "seq_length": 128}
    section = {"model": model, "data": data, "store": str(tmp_path / "store"), "top_k": 4}
    store = Store.open(teach(validate(TeachRun, section, "teach")))
    run = make_run(objective={"name": "distill", "store": str(store.path)}, training={"train_iters": 1})
    trainer, _ = open_trainer(run)
    probabilities: list[float] = []
    for sample in (sample for part in trainer.data.step(0).samples for sample in part):
        row = store.get(sample.key)
        assert row is not None
        for p, label in enumerate(sample.ids[sample.positions + 1]):
            probabilities.append(sum(math.exp(row.logp_PK[p, k]) for k in np.flatnonzero(row.ids_PK[p] == label)))
    trainer.fit()
    (found,) = read_metrics(tmp_path / "run")
    mean = sum(probabilities) / len(probabilities)
    assert found["label-prob equal"] == pytest.approx(mean, rel=1e-5)
    assert [name for name in found if name.startswith(("label-prob", "position-share"))] == ["label-prob equal"]
    assert f"| label-prob equal {_number(found['label-prob equal'])} |" in capfd.readouterr().err


@pytest.mark.parametrize("in_background", [False, True])
def test_the_last_row_has_the_peak_of_the_last_save(
    in_background: bool, make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 MiB that the trainer holds while it plans a save, and 48 MiB that each of the two writers holds."""
    state, write = checkpoints_module.training_state, saver_module._write_bucket
    before, held = list[int](), list[bytes]()

    def planning(*arguments: Any) -> Any:
        before.append(peak_memory(torch.device("cpu")))
        now = psutil.Process().memory_info().rss
        with mmap.mmap(-1, before[0] - now + (64 << 20)) as block:
            block.write(b"1" * len(block))
        return state(*arguments)

    def writing(*arguments: Any, **more: Any) -> None:
        held.append(b"1" * (48 << 20))
        write(*arguments, **more)

    monkeypatch.setattr(checkpoints_module, "training_state", planning)
    monkeypatch.setattr(saver_module, "_write_bucket", writing)
    train(make_run(training={"train_iters": 2, "async_save": in_background}))
    rows = read_metrics(tmp_path / "run")
    slack = 8 << 20
    assert rows[0][CPU_MEMORY] <= before[0] and len(before) == 1 and not held
    least = before[0] + ((64 + 2 * 48) << 20)
    assert least - slack <= rows[1][CPU_MEMORY]
    # Pages that this process changes while the writers live are theirs alone from then on, and count: more of them the
    # more tests before this one have left to it, and all if that is gigabytes.
    assert rows[1][CPU_MEMORY] <= (least + (160 << 20) + before[0] // 2 if before[0] < 1 << 30 else 3 * least)
    assert [row["iteration"] for row in rows] == [1, 2]
    assert not list((tmp_path / "run").rglob("*.memory"))


def test_wandb_that_is_not_installed(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    with pytest.raises(UserError, match="wandb_project: the package wandb is not installed; pip install wandb"):
        train(make_run(training={"wandb_project": "p"}))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in for wandb, which is no dependency; the runs it was asked for."""
    started: list[Any] = []

    class Run:
        def __init__(self, **settings: Any) -> None:
            self.settings, self.rows, self.axes, self.finished = settings, [], [], False
            started.append(self)

        def define_metric(self, name: str, step_metric: str | None = None) -> None:
            self.axes.append((name, step_metric))

        def log(self, row: dict[str, float]) -> None:
            self.rows.append(row)

        def finish(self) -> None:
            self.finished = True

    module = types.ModuleType("wandb")
    module.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)
    module.init, module.Error = Run, type("Error", (Exception,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return started


def test_wandb_gets_every_row_and_a_resumed_run_is_the_same(make_run: MakeRun, runs: list[Any], tmp_path: Path) -> None:
    train(make_run(training={"train_iters": 2, "wandb_project": "p"}))
    (run,) = runs
    written = read_metrics(tmp_path / "run")
    # What the last save needed is known after it.
    assert written[1].pop(CPU_MEMORY) >= run.rows[1].pop(CPU_MEMORY)
    assert run.rows == written and run.finished
    assert ("*", "iteration") in run.axes
    assert run.settings["project"] == "p" and run.settings["name"] == "run"
    assert run.settings["config"]["optimizer"]["lr"] == 2e-3
    train(make_run(training={"train_iters": 2, "wandb_project": "p"}))
    assert runs[1].settings["id"] == run.settings["id"] and runs[1].settings["resume"] == "allow"


def test_what_wandb_refuses_is_one_line(make_run: MakeRun, runs: list[Any]) -> None:
    def refuse(**_: Any) -> None:
        raise sys.modules["wandb"].Error("api_key not configured\nrun wandb login")  # type: ignore[attr-defined]

    sys.modules["wandb"].init = refuse  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"^training.wandb_project: api_key not configured \(WANDB_MODE=offline"):
        train(make_run(training={"train_iters": 1, "wandb_project": "p"}))
