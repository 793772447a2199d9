"""What monitoring adds to a run: readings in its rows, warnings of spikes; and nothing where it is off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusemega.monitoring.ranks import read_ranks
from fusemega.training.assembly import train
from fusemega.training.monitor import Monitor
from fusemega.training.records import COSTS, read_metrics
from fusemega.training.run_file import TrainRun

MakeRun = Callable[..., TrainRun]
HOST = ("cpu_percent", "virtual_memory.percent", "process.cpu_percent", "process.memory_info.rss")


def test_rows_have_readings_of_the_machine(make_run: MakeRun, tmp_path: Path) -> None:
    train(make_run(monitoring={"sample_seconds": 3600}))
    rows = read_metrics(tmp_path / "run")
    read = [row for row in rows if "host/process.memory_info.rss max" in row]
    assert len(read) == 1, "one reading goes into one row"
    assert read[0].keys() >= {f"host/{name} max" for name in HOST} <= {name for name in read[0] if name in COSTS}
    assert read[0]["host/process.memory_info.rss max"] > 50e6
    (state,) = read_ranks(tmp_path / "run")
    assert state.device_state.keys() == set(HOST) and state.iteration == 4 and state.ended == "finished"


def test_what_is_switched_off_leaves_nothing(make_run: MakeRun, tmp_path: Path) -> None:
    train(make_run(monitoring={"heartbeat_seconds": None, "sample_seconds": None}))
    assert not (tmp_path / "run" / "monitor").exists()
    assert not any(name.startswith(("host/", "gpu/")) for row in read_metrics(tmp_path / "run") for name in row)


def test_a_refused_run_leaves_no_heartbeat(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused after its heartbeat has begun, and before it is a run."""

    def refuse(trainer: Any) -> None:
        assert read_ranks(tmp_path / "run") != []
        raise RuntimeError("refused")

    monkeypatch.setattr("fusemega.training.assembly.check_reference", refuse)
    with pytest.raises(RuntimeError, match="refused"):
        train(make_run())
    assert not (tmp_path / "run").exists()
    # A kill in the middle leaves the file; the next start is not refused for it.
    (tmp_path / "run" / "monitor").mkdir(parents=True)
    (tmp_path / "run" / "monitor" / "rank-00007.json").write_text("{}")
    monkeypatch.undo()
    train(make_run())


def test_a_run_warns_of_a_spike(
    make_run: MakeRun, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient norm of the last update is a thousand times the others'."""
    seen = Monitor._watch_spikes

    def raised(self: Monitor, iteration: int, values: dict[str, float], factor: float) -> None:
        seen(self, iteration, {**values, "grad-norm": values["grad-norm"] * (1000 if iteration == 24 else 1)}, factor)

    monkeypatch.setattr(Monitor, "_watch_spikes", raised)
    train(make_run(training={"train_iters": 24}))
    err = capfd.readouterr().err
    assert err.count("warning: grad-norm") == 1 and "at iteration 24, after a median of" in err
