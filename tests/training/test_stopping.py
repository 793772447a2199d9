"""Evaluation on the way, and what ends a run before its last iteration: patience, or a signal."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fusemega.checkpoint.series import latest_checkpoint
from fusemega.config import validate
from fusemega.errors import UserError
from fusemega.runtime.signals import STOPPING
from fusemega.scoring.evaluate import EvalRun, evaluate
from fusemega.scoring.evaluation import Evaluation
from fusemega.training import held_out as held_out_module
from fusemega.training import trainer as trainer_module
from fusemega.training.assembly import open_trainer, train
from fusemega.training.records import COSTS, read_evaluations, read_metrics
from fusemega.training.run_file import TrainRun

MakeRun = Callable[..., TrainRun]


@pytest.fixture
def section(work: Path) -> dict[str, Any]:
    """An `evaluation` section on the training text itself."""
    return {"data": {"path": str(work / "chat.jsonl"), "seq_length": 96}, "interval": 2}


def stored(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("iter_*"))


def test_values_are_those_of_eval_and_change_nothing(
    make_run: MakeRun, work: Path, tmp_path: Path, section: dict[str, Any]
) -> None:
    plain = make_run(output_dir=str(tmp_path / "plain"), training={"train_iters": 5})
    watched = make_run(
        output_dir=str(tmp_path / "watched"), training={"train_iters": 5, "export_hf": True}, evaluation=section
    )
    assert train(plain) == train(watched) == 0
    curves = [
        [{k: v for k, v in row.items() if k not in COSTS} for row in read_metrics(tmp_path / name)]
        for name in ("plain", "watched")
    ]
    assert curves[0] == curves[1]
    rows = read_evaluations(tmp_path / "watched")
    assert [row["iteration"] for row in rows] == [0, 2, 4, 5]
    for load, row in ((work / "model", rows[0]), (tmp_path / "watched" / "hf", rows[-1])):
        model = {"load": str(load), "dtype": "fp32"}
        alone, _ = evaluate(validate(EvalRun, {"model": model, "data": section["data"]}, "eval"))
        assert row["loss"] == pytest.approx(alone.loss, rel=1e-6) and row["tokens"] == alone.tokens
        assert row["bits_per_byte"] == pytest.approx(alone.bits_per_byte, rel=1e-6)
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], None]:
    """Makes evaluations find these losses, one after the other."""

    def script(values: list[float]) -> None:
        left = iter(values)

        def found(*_: object) -> Evaluation:
            return Evaluation(loss=next(left), perplexity=1, bits_per_byte=1, tokens=1, bytes=1, samples=1)

        monkeypatch.setattr(held_out_module, "evaluate_model", found)

    return script


def test_patience_and_the_best_checkpoint(
    make_run: MakeRun, tmp_path: Path, section: dict[str, Any], losses: Callable[[list[float]], None]
) -> None:
    losses([9.0, 5.0, 3.0, 4.0, 3.5, 1.0])  # the last would be seen at iteration 10
    run = make_run(
        training={"train_iters": 20, "export_hf": True, "keep_checkpoints": 1},
        evaluation={**section, "patience": 2, "keep_best": True},
    )
    assert train(run) == 0
    output = tmp_path / "run"
    assert [row["loss"] for row in read_evaluations(output)] == [9.0, 5.0, 3.0, 4.0, 3.5]
    assert len(read_metrics(output)) == 8 and (output / "done").read_text() == "8\n"
    assert stored(output) == ["iter_0000004", "iter_0000008"]  # the best, and the newest
    newest = latest_checkpoint(output / "checkpoints")
    assert newest is not None and json.loads((newest / "state.json").read_text())["best"]["iteration"] == 4
    # What was exported is the model after 4 updates.
    losses([9.0, 5.0, 3.0])
    four = make_run(output_dir=str(tmp_path / "four"), training={"train_iters": 20, "export_hf": True})
    trainer, checked = open_trainer(four)
    for _ in range(4):
        trainer.step()
    trainer.save()
    exported = load_file(output / "hf" / "model.safetensors")
    head = trainer.gpt.head.weight[: trainer.gpt.vocab_size].float()
    assert torch.equal(exported["model.embed_tokens.weight"].float(), head)
    assert train(run) == 0 and len(read_metrics(output)) == 8  # patience is remembered


def test_retention_without_evaluation(make_run: MakeRun, tmp_path: Path) -> None:
    train(make_run(training={"train_iters": 5, "save_interval": 1, "keep_checkpoints": 2}))
    assert stored(tmp_path / "run") == ["iter_0000004", "iter_0000005"]


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_ends_the_step_with_a_checkpoint(
    make_run: MakeRun, tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_run(output_dir=str(tmp_path / "whole"))
    train(whole)
    step = trainer_module.Trainer.step

    def interrupted(trainer: trainer_module.Trainer) -> dict[str, float]:
        if trainer.iteration == 1:
            os.kill(os.getpid(), number)
        return step(trainer)

    monkeypatch.setattr(trainer_module.Trainer, "step", interrupted)
    run = make_run(output_dir=str(tmp_path / "stopped"))
    outside = signal.signal(number, signal.SIG_DFL)  # nohup ignores HUP, also for these tests
    try:
        assert train(run) == number
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, outside)
    assert stored(tmp_path / "stopped") == ["iter_0000002"] and not (tmp_path / "stopped" / "done").exists()
    monkeypatch.setattr(trainer_module.Trainer, "step", step)
    assert train(run) == 0
    a, b = (
        [{k: v for k, v in row.items() if k not in COSTS} for row in read_metrics(tmp_path / name)]
        for name in ("whole", "stopped")
    )
    assert a == b


def test_refused(make_run: MakeRun, section: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="evaluation.intervall: unknown key .*did you mean 'interval'"):
        make_run(evaluation={**section, "intervall": 3})
    with pytest.raises(UserError, match="no_such.jsonl"):
        train(make_run(evaluation={"data": {"path": str(tmp_path / "no_such.jsonl"), "seq_length": 96}, "interval": 1}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", STOPPING)
def test_an_ignored_signal(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    """`nohup` ignores HUP and means it, as a shell's `&` does INT; slurm/train.sbatch ignores USR1 for itself alone."""
    step = trainer_module.Trainer.step

    def hung_up(trainer: trainer_module.Trainer) -> dict[str, float]:
        os.kill(os.getpid(), number)
        return step(trainer)

    monkeypatch.setattr(trainer_module.Trainer, "step", hung_up)
    outside = signal.signal(number, signal.SIG_IGN)
    try:
        assert train(make_run()) == (0 if number in (signal.SIGHUP, signal.SIGINT) else number)
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, outside)
