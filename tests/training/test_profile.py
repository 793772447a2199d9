"""`training.profile`: which iterations are recorded, what is left in the folder, and what the report shows of it."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType

from fusemega.errors import UserError
from fusemega.report.page import render
from fusemega.report.runs import open_runs
from fusemega.training.assembly import open_trainer, train
from fusemega.training.dry_run import describe
from fusemega.training.profile import Profile, table_of
from fusemega.training.profile_table import Operation, ProfileTable, read_profile
from fusemega.training.run_file import TrainRun

MakeRun = Callable[..., TrainRun]


def spans(folder: Path) -> list[str]:
    """The names of a trace's iterations."""
    trace = json.loads(gzip.decompress((folder / "profile" / "rank0.trace.json.gz").read_bytes()))
    return sorted(
        {event["name"] for event in trace["traceEvents"] if re.fullmatch(r"iteration \d+", event.get("name", ""))}
    )


def test_a_profile_and_its_report(make_run: MakeRun, tmp_path: Path) -> None:
    section: dict[str, Any] = {"start": 1, "stop": 3}
    few = {"global_batch_size": 2, "train_iters": 3}
    run = make_run(training={"profile": section, **few})
    trainer, _ = open_trainer(run)
    assert trainer.fit() == 0
    folder = tmp_path / "run"
    (table,) = read_profile(folder)
    assert (table.rank, table.start, table.stop) == (0, 1, 3) and spans(folder) == ["iteration 1", "iteration 2"]
    calls = {row.name: row.calls for row in table.operations}
    # Each of the model's 4 layers has one attention in each micro-batch of both iterations.
    micro_batches = sum(len(trainer.data.step(i).micro_batches) for i in (1, 2))
    assert calls["aten::mm"] % micro_batches == 0 and calls["aten::mm"] >= 4 * micro_batches
    costs = [row.cpu_us for row in table.operations]
    assert costs == sorted(costs, reverse=True) and 0 < sum(costs) <= table.cpu_us * 1.0001 and table.gpu_us == 0
    page = render(open_runs([folder]), [])
    assert "<h2>Top operations</h2>" in page and "<td>aten::mm</td>" in page and "iterations 1 to 2" in page
    # The same command again has nothing to do, and the profile stays; another profile replaces it.
    before = (folder / "profile" / "rank0.json").read_bytes()
    assert train(run) == 0 and (folder / "profile" / "rank0.json").read_bytes() == before
    longer = make_run(output_dir=str(tmp_path / "run"), training={"profile": {"start": 0, "stop": 1}, **few})
    trainer, _ = open_trainer(longer)
    trainer.iteration = 0
    trainer.fit()
    assert [(table.start, table.stop) for table in read_profile(folder)] == [(0, 1)]


def test_the_time_of_a_gpu_counts_once() -> None:
    """As torch gives it: the time of a kernel is with the operation that starts it, too."""

    def row(key: str, kind: Any, us: float, note: bool = False) -> Any:
        times = {"self_cpu_time_total": 9 if kind == DeviceType.CPU else 0, "self_device_time_total": us}
        return SimpleNamespace(key=key, count=2, device_type=kind, is_user_annotation=note, **times)

    rows = [row("aten::add", DeviceType.CPU, 1000), row("aten::mm", DeviceType.CPU, 3000)]
    rows += [row("sm90_gemm", DeviceType.CUDA, 3000), row("add_kernel", DeviceType.CUDA, 1000)]
    rows += [row("a mark", DeviceType.CUDA, 4000, note=True), row("iteration 0", DeviceType.CUDA, 4000, note=True)]
    profiler: Any = SimpleNamespace(key_averages=lambda: rows)
    first, second = Operation("aten::mm", 2, 9.0, 3000.0), Operation("aten::add", 2, 9.0, 1000.0)
    assert table_of(profiler, 0, 0, 1) == ProfileTable(0, 0, 1, [first, second], 18.0, 4000.0)


def test_a_run_that_ends_early_keeps_what_was_recorded(make_run: MakeRun, tmp_path: Path) -> None:
    trainer, _ = open_trainer(make_run(training={"profile": {"start": 1, "stop": 4}, "global_batch_size": 2}))
    checked = trainer.callback(Profile)
    for _ in range(2):
        checked.on_step_begin(trainer)
        checked.on_step_end(trainer, trainer.step())
    checked.on_end(trainer, None)  # as after a signal
    assert [(table.start, table.stop) for table in read_profile(tmp_path / "run")] == [(1, 2)]
    assert spans(tmp_path / "run") == ["iteration 1"]


def test_off_by_default(make_run: MakeRun) -> None:
    trainer, _ = open_trainer(make_run())
    assert not [callback for callback in trainer.callbacks if isinstance(callback, Profile)]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"start": 2, "stop": 2}, "start 2 is not below stop 2"),
        ({"start": 0, "stop": 5}, "training.profile.stop: 5 is more than the run's 4 iteration"),
        ({"start": 0, "stop": 1, "ranks": [0, 1]}, "training.profile.ranks: there is no rank 1 among 1 process"),
        ({"start": 0, "stop": 1, "ranks": [0, 0]}, "ranks: 0 is listed twice"),
        ({"start": 0, "stop": 1, "ranks": [-1]}, "ranks: -1 is not a rank"),
        ({"start": 0, "stop": 1, "ranks": []}, "training.profile.ranks"),
        ({"start": 0, "stop": 1, "steps": 3}, "steps: unknown key"),
    ],
)
def test_refused(make_run: MakeRun, section: dict[str, Any], message: str, tmp_path: Path) -> None:
    for refuse in (train, lambda run: describe(run, 1)):
        with pytest.raises(UserError, match=message):
            refuse(make_run(training={"profile": section}))
    assert not (tmp_path / "run").exists()


def test_a_folder_of_something_else_stays(make_run: MakeRun, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = make_run(training={"profile": {"start": 0, "stop": 1}, "train_iters": 1, "global_batch_size": 2})
    train(run)
    (folder / "profile" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes.txt: not a file of the profile"):
        train(run)
    (folder / "profile" / "notes.txt").unlink()
    (folder / "profile" / "rank0.json").write_text('{"format": "fusemega-profile-1", "operations": []}')
    with pytest.raises(UserError, match=r"rank0.json: was changed after the profile"):
        train(run)
    with pytest.raises(UserError, match=r"rank0.json: damaged: expected rank, start"):
        open_runs([folder])
