"""The check's frame: a part that fails, dies or hangs is reported, with what it had found, and hides no other."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from gpu import table
from gpu.elsewhere import on_cpu
from gpu.job import Job
from gpu.registry import PARTS, Part
from gpu.report import NOT_MEASURED, OK, WRONG, Report, Row, read_rows
from gpu.runner import Result, run_parts

from tests.gpu import parts

ENDS = {
    "raises": ("done", "RuntimeError: no such kernel"),
    "killed": ("was killed by SIGKILL", "was killed by SIGKILL; last line of its log: about to die"),
    "exits": ("failed with status 3", "failed with status 3; last line of its log: nothing"),
    "hangs": ("ran past its limit of 4 s", "in hangs"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Result], Path, list[int]]:
    """A good part, those of `ENDS`, one that is not there, and a good one again; how many each call was told of."""
    folder, told = tmp_path_factory.mktemp("check"), []
    names = ["good", *ENDS, "not_there"]
    parts = [
        Part(name, "tests.gpu.parts" if name != "not_there" else "gpu.none", 4 if name == "hangs" else 60)
        for name in names
    ]
    found = run_parts([*parts, parts[0]], folder, False, 600, lambda results: told.append(len(results)))
    return found, folder, told


def test_every_part_is_reported(results: tuple[list[Result], Path, list[int]]) -> None:
    found, _, told = results
    assert told == list(range(1, len(found) + 1)), "told after each"
    for result in found[1:-2]:
        end, words = ENDS[result.part.name]
        assert result.end == end
        assert [row.what for row in result.rows][0] == "before" and result.rows[0].verdict == OK, (
            "found before it ended"
        )
        assert result.rows[-1].verdict == WRONG and words in str(result.rows[-1].found)
        assert result.wrong == 1 and "after" not in [row.what for row in result.rows]
    assert "ModuleNotFoundError: No module named 'gpu.none'" in str(found[-2].rows[-1].found)
    for good in (found[0], found[-1]):
        assert good.end == "done" and [row.what for row in good.rows] == ["before", "a case that fails", "after"]
        assert good.rows[1].found == "ValueError: of this case alone"


def test_what_a_part_started_ends_with_it(results: tuple[list[Result], Path, list[int]]) -> None:
    child = int((results[1] / "work" / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_the_table_and_the_json(results: tuple[list[Result], Path, list[int]], tmp_path: Path) -> None:
    found = table.summary(results[0], {"quick": True})
    assert not found["ok"] and found["wrong"][0] == "good: a case that fails" and len(found["wrong"]) == 7
    table.write(tmp_path, found)
    assert json.loads((tmp_path / "check.json").read_text()) == found
    shown = "\n".join(table.lines(results[0]))
    for words in ("hangs   ran past its limit of 4 s, 4 s", "ok            before", "1 (at most 2)", "3 s"):
        assert words in shown, words


def test_what_does_not_begin_in_time_is_not_measured(tmp_path: Path) -> None:
    (result,) = run_parts([Part("good", "tests.gpu.parts", 60)], tmp_path, True, 3.0, lambda _: None)
    assert result.end == "not begun" and result.rows == [
        Row("all", NOT_MEASURED, "the 0.05 minutes of the whole check were over")
    ]
    assert table.summary([result], {})["ok"], "nothing that ran is wrong"


def test_rows(tmp_path: Path) -> None:
    report = Report(tmp_path / "rows")
    report.compare("not a number", float("nan"), 1.0)
    report.compare("at the bound", 1.0, 1.0)
    report.require("words", False, "seen")
    with (tmp_path / "rows").open("a") as file:
        file.write('{"what": "cut o')
    assert [row.verdict for row in read_rows(tmp_path / "rows")] == [WRONG, OK, WRONG]
    assert read_rows(tmp_path / "nothing") == []


def test_the_limits_fit() -> None:
    names = [part.name for part in PARTS]
    assert len(set(names)) == len(names) and names[0] == "environment"
    assert all(5 <= part.limit <= 300 for part in PARTS)


def test_on_the_cpu_of_a_machine_with_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In another process, from which the GPU is hidden; without a GPU, here."""
    job = Job("part", tmp_path)
    job.card = SimpleNamespace(is_gpu=True)  # type: ignore[assignment]
    found = on_cpu(job, parts.echo, words=["a"])
    assert found["words"] == ["a"] and found["device"] == "cpu" and torch.equal(found["tensor"], torch.arange(3))
    job.card = SimpleNamespace(is_gpu=False)  # type: ignore[assignment]
    monkeypatch.delenv("FUSEMEGA_DEVICE", raising=False)
    with pytest.raises(KeyError, match="FUSEMEGA_DEVICE"):
        on_cpu(job, parts.echo, words=["a"])
