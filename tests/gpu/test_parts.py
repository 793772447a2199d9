"""What the parts compute, on a CPU: the miniature as a command, and the branches for a card at tiny sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from gpu import (
    environment,
    exact_head,
    fp8,
    head_cost,
    objectives,
    packed_attention,
    real_fusion,
    resume,
    shared_prompts,
    speed,
    step_cost,
)
from gpu.card import Card
from gpu.job import Job
from gpu.models import SHAPES, model_folder
from gpu.registry import PARTS
from gpu.report import FOUND, MEASURED, NOT_MEASURED, OK, WRONG, Report, Row, read_rows
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
T = TypeVar("T")


class Pretended(Job):
    """A job on a card, as far as a CPU can be one: its rows are those of a GPU, its sizes tiny."""

    real = True  # type: ignore[assignment]

    def __init__(self, name: str, work: Path) -> None:
        super().__init__(name, work)
        self.card = Card(CPU, "NVIDIA H100 80GB HBM3")

    def size(self, real: T, tiny: T) -> T:
        return tiny


def rows_of(module: Any, job: Job) -> dict[str, Row]:
    job.work.mkdir(exist_ok=True)
    path = job.work / "rows.jsonl"
    module.measure(Report(path), job)
    rows = read_rows(path)
    wrong = [row for row in rows if row.verdict == WRONG]
    assert not wrong, wrong
    return {row.what: row for row in rows}


def test_the_command(tmp_path: Path) -> None:
    """On a machine without a GPU: what can run there is right, and the rest is said. The other parts are below."""
    chosen = ["environment", "head", "speed-8b"]
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu" / "check.py"), "--quick", "--out", str(tmp_path / "out")]
    ended = subprocess.run(
        [*command, "--minutes", "30", "--parts", *chosen],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"FUSEMEGA_DEVICE": "cpu"},
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    last = json.loads(ended.stdout.splitlines()[-1])
    assert last["ok"] and last["quick"] and last["parts"] == dict.fromkeys(chosen, "done")
    found = json.loads((tmp_path / "out" / "check.json").read_text())
    verdicts = {name: {row["verdict"] for row in part["rows"]} for name, part in found["parts"].items()}
    assert verdicts == {
        "environment": {FOUND, NOT_MEASURED},
        "head": {OK, NOT_MEASURED},
        "speed-8b": {NOT_MEASURED},
    }
    assert "not measured  all  no GPU" in ended.stdout
    assert not (tmp_path / "out" / "work").exists()


def test_a_folder_of_others_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("mine")
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu" / "check.py"), "--out", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"FUSEMEGA_DEVICE": "cpu"})
    assert ended.returncode == 2 and ended.stderr.startswith(f"error: {tmp_path}/work: exists and was not made by")
    assert (tmp_path / "work" / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("module", [packed_attention, objectives, resume, real_fusion], ids=lambda m: m.__name__)
def test_the_miniature(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the other parts, in this process."""
    monkeypatch.setenv("FUSEMEGA_DEVICE", "cpu")
    rows = rows_of(module, Job("part", tmp_path / "work", quick=True))
    assert OK in {row.verdict for row in rows.values()}
    assert MEASURED not in {row.verdict for row in rows.values()}, "no figure of a CPU"


def test_every_part_is_here() -> None:
    tested = {
        packed_attention,
        objectives,
        resume,
        real_fusion,
        speed,
        head_cost,
        shared_prompts,
        fp8,
        environment,
        exact_head,
    }
    assert {part.module for part in PARTS} == {module.__name__ for module in tested}


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (speed, shared_prompts):
        monkeypatch.setattr(module, "WARM_UP", 1)
        monkeypatch.setattr(module, "TIMED", 1)


@pytest.mark.usefixtures("few_steps")
def test_a_step_beside_transformers_as_on_a_card(tmp_path: Path) -> None:
    rows = rows_of(speed, Pretended("speed-1b", tmp_path / "work"))
    for arm in ("sft", "transformers, sft", "distill"):
        assert rows[f"{arm}: speed"].unit == "tokens/s" and rows[f"{arm}: speed"].found > 0
        operations = rows[f"{arm}: most expensive operations"].details
        assert len(operations) == 20 and operations[0]["share"] >= operations[-1]["share"] > 0
        assert 0 < rows[f"{arm}: MFU, of 989 TFLOP/s"].found < 1
    assert rows["sft: losses beside transformers"].verdict == OK
    assert len(rows["sft: losses beside transformers"].details["ours"]) == 3, "the last in the profile"


def test_flops_of_a_step(tmp_path: Path) -> None:
    """Counted by torch, whose attention is not causal: twice as much."""
    model = AutoModelForCausalLM.from_pretrained(
        model_folder(tmp_path, "tiny", Card(CPU, "CPU")), attn_implementation="eager", dtype=torch.float32
    )
    lengths = [24, 40]
    with FlopCounterMode(display=False) as counter:
        for length in lengths:
            model(torch.zeros(1, length).long()).logits.sum().backward()
    shape = SHAPES["tiny"]
    squares = shape["num_hidden_layers"] * shape["num_attention_heads"] * shape["head_dim"] * (24**2 + 40**2)
    assert counter.get_total_flops() == speed.step_flops("tiny", lengths) + 6 * squares


def test_where_the_host_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step() -> None:
        for _ in range(3):
            warnings.warn(
                "called a synchronizing CUDA operation (Triggered internally at CUDAFunctions.cpp)", stacklevel=1
            )
        warnings.warn("another", stacklevel=1)

    (found,) = step_cost.synchronisations(step).items()
    assert found[0].startswith("tests/gpu/test_parts.py:") and found[1] == 3
    assert modes == ["warn", "default"]


def test_the_head_as_on_a_card(tmp_path: Path) -> None:
    rows = rows_of(head_cost, Pretended("head-cost", tmp_path))
    for arm in ("dense-ce", "fused-ce", "recompute-kd", "fused-kl"):
        assert rows[f"{arm}: time"].details > 0 and "of dense" in rows[f"{arm}: time"].found
    assert rows["fused-kl: gradient beside dense"].verdict == OK
    assert rows["liger-ce"].verdict == NOT_MEASURED


@pytest.mark.usefixtures("few_steps")
def test_rates_and_pairs_as_on_a_card(tmp_path: Path) -> None:
    job = Pretended("shared-prompts", tmp_path / "work")
    assert environment.matrix_rate(job) > 0 and environment.copy_rate(job) > 0 and environment.transfer_rate(job) > 0
    rows = rows_of(shared_prompts, job)
    assert rows["prompts of 75 %, once in a row: speed"].unit == "pairs/s"


def test_curves_of_layers_beside_each_other(tmp_path: Path) -> None:
    """With arms that a CPU has, in place of Transformer Engine's."""
    job = Pretended("fp8", tmp_path)
    report, folder = Report(tmp_path / "rows.jsonl"), job.folder()
    task = speed.task_of(job, "1b", folder)
    arms: dict[str, dict[str, Any]] = {fp8.BASE: {"transformer_impl": "local"}, "auto": {"transformer_impl": "auto"}}
    fp8.compare(report, job, replace(task, steps=8, lr=1e-3), folder, arms)
    rows = {row.what: row for row in read_rows(tmp_path / "rows.jsonl")}
    assert rows[f"{fp8.BASE}: it learns"].verdict == OK and rows["auto: speed"].found > 0
    assert rows[f"auto: last losses beside {fp8.BASE}"].found == 0


def test_how_curves_are_told(tmp_path: Path) -> None:
    report = Report(tmp_path / "rows.jsonl")
    curves = {
        "control": [{"tokens": 0.0, "chat": 2.0, "code": 3.0}, {"tokens": 2e6, "chat": 1.5, "code": 3.2}],
        "fused": [{"tokens": 0.0, "chat": 2.0, "code": 3.0}, {"tokens": 2e6, "chat": 1.25, "code": 4.0}],
    }
    real_fusion.tell(report, Pretended("fusion", tmp_path), curves)
    rows = {row.what: row for row in read_rows(tmp_path / "rows.jsonl")}
    assert rows["control learns: mean bits per byte at its best"].found == pytest.approx(2.35)
    assert rows["fused learns: mean bits per byte at its best"].verdict == WRONG, "2.625 after 2.5"
    assert rows["chat, after 2.0 million tokens"].found.endswith("fused 2.0000, best 1.2500, last 1.2500")
