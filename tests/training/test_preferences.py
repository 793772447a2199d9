"""Preference losses in a run: their metrics, held-out pairs, and a ramp that a resumed run goes on with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusemega.errors import UserError
from fusemega.losses.preference import OF_PAIRS
from fusemega.report.page import charts_of
from fusemega.report.runs import open_runs
from fusemega.training.assembly import open_trainer, train
from fusemega.training.dry_run import describe
from fusemega.training.records import read_evaluations, read_metrics
from fusemega.training.run_file import TrainRun
from tests.losses.preferences import write_sources

MakeRun = Callable[..., TrainRun]


@pytest.fixture(scope="module")
def rows(work: Path) -> Path:
    return write_sources(work / "sources.jsonl", work / "chat.jsonl")


@pytest.fixture
def preference(make_run: MakeRun, work: Path, rows: Path) -> MakeRun:
    """`make_run` on these rows, with the model that training starts from as the reference."""

    def make(objective: dict[str, Any], **sections: Any) -> TrainRun:
        reference = {"in_job": {"load": str(work / "model"), "dtype": "fp32"}}
        data = {"path": str(rows), "seq_length": 512}
        training = {"train_iters": 3, "global_batch_size": 4} | sections.pop("training", {})
        return make_run(objective={"reference": reference} | objective, data=data, training=training, **sections)

    return make


WRPO = {"name": "wrpo", "alpha": 0.6, "beta": 0.5, "target": "target"}


def test_metrics_and_held_out_pairs(preference: MakeRun, tmp_path: Path, rows: Path) -> None:
    """All reach metrics.jsonl, evaluations.jsonl and the report page."""
    held_out = {"data": {"path": str(rows), "seq_length": 512}, "interval": 3}
    run = preference(
        {"name": "fuse_po", "beta": 0.5, "alpha": "auto"}, evaluation=held_out, optimizer={"lr_warmup_fraction": 0.0}
    )
    assert train(run) == 0
    found = read_metrics(tmp_path / "run")
    names = {
        *OF_PAIRS,
        "kl",
        "lengths/chosen",
        "lengths/rejected",
        "weights/target",
        "weights/source a",
        "fuse_po loss",
    }
    assert all(names <= row.keys() for row in found)
    # The model is still its own reference.
    assert found[0]["fuse_po loss"] == pytest.approx(0.693147, rel=1e-5)
    assert found[0]["rewards/margins"] == pytest.approx(0, abs=1e-5) and found[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert found[0]["weights/target"] + found[0]["weights/source a"] == pytest.approx(1)
    before, after = read_evaluations(tmp_path / "run")
    assert before["groups"] == 8 and before["loss"] == pytest.approx(0.693147, rel=1e-5)
    # It learns these very pairs.
    assert after["loss"] < 0.65 and after["rewards/accuracies"] > 0.7 and after["rewards/margins"] > 0.1
    assert after["rewards/margins"] == pytest.approx(after["rewards/chosen"] - after["rewards/rejected"])
    drawn = {chart.title for chart in charts_of(open_runs([tmp_path / "run"]))}
    assert {"rewards/accuracies", "validation rewards/accuracies", "weights/source a"} <= drawn


def test_a_resumed_run_goes_on_with_the_ramp(preference: MakeRun, tmp_path: Path) -> None:
    """alpha = 0.6 t / 3 of the update after t."""
    trainer, _ = open_trainer(preference(WRPO))
    alone = [trainer.step() for _ in range(3)]
    assert [row["alpha"] for row in alone] == pytest.approx([0, 0.2, 0.4])
    left, _ = open_trainer(preference(WRPO, output_dir=str(tmp_path / "left")))
    left.step()
    left.save()
    resumed, _ = open_trainer(preference(WRPO, output_dir=str(tmp_path / "left")))
    for wanted in alone[1:]:
        row = resumed.step()
        assert {name: row[name] for name in row if name != "iteration-time"} == {
            name: wanted[name] for name in wanted if name != "iteration-time"
        }


@pytest.mark.parametrize("change", [{"packing": False}, {"micro_batch_size": 3}], ids=str)
def test_rows_do_not_change_the_curve(preference: MakeRun, change: dict[str, Any]) -> None:
    """Groups of unequal lengths; with weights of tokens too."""
    objective = {"name": "dpo", "beta": 0.5, "ld_alpha": 0.4, "rpo_alpha": 0.2}
    curves = []
    for training in ({}, change):
        trainer, _ = open_trainer(preference(objective, training=training))
        # Of each prompt's five responses the best and the worst are compared, and no others are in the batch.
        assert sum(len(batch.sources) for batch in trainer.data.step(0).micro_batches) == 2 * 4
        curves.append([trainer.step() for _ in range(2)])
    for one, other in zip(*curves, strict=True):
        assert other["dpo loss"] == pytest.approx(one["dpo loss"], rel=1e-6)
        assert other["grad-norm"] == pytest.approx(one["grad-norm"], rel=1e-5)


def test_bad_data_is_refused_before_the_run(preference: MakeRun, work: Path, rows: Path) -> None:
    assert "alpha=0.6" in describe(preference(WRPO), 1)
    with pytest.raises(UserError, match=r"no response has the source 'targte' .* \(did you mean 'target'"):
        describe(preference({**WRPO, "target": "targte"}), 1)
    text = {"data": {"path": str(work / "pair.jsonl"), "seq_length": 512}, "interval": 1}
    (work / "pair.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    with pytest.raises(
        UserError, match="pair.jsonl: no response has the source 'target' of objective.target; found: none"
    ):
        describe(preference(WRPO, evaluation=text), 1)
