"""Reports: every number on the page against a count of its own, one run and eight, and what is said of missing data."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from fusemega.errors import UserError
from fusemega.files.owned import LIST
from fusemega.monitoring.ranks import RankState
from fusemega.report import charts
from fusemega.report.page import PAGE, charts_of, write_report
from fusemega.report.runs import open_runs
from fusemega.training.records import DONE_MARKER, METRICS_FILE, RUN_RECORD

SETTINGS = {"output_dir": "x", "optimizer": {"lr": 1e-3}, "training": {"train_iters": 5, "global_batch_size": 4}}


def write_run(folder: Path, iterations: int = 5, *, done: bool = True, tail: str = "", **changes: Any) -> Path:
    """A run with losses 5/1, 5/2, ..., 100 tokens and half a second an iteration, and memory that grows."""
    folder.mkdir(parents=True)
    settings = json.loads(json.dumps(SETTINGS))
    for key, value in changes.items():
        section, _, name = key.partition("__")
        settings[section][name] = value
    (folder / RUN_RECORD).write_text(json.dumps({"fusemega": "0", "run": settings}))
    rows = [
        {
            "iteration": i,
            "lm loss": 5 / i,
            "grad-norm": 1.0,
            "learning-rate": 1e-3,
            "consumed-samples": 4 * i,
            "tokens": 100,
            "iteration-time": 0.5,
            "tokens-per-second": 200.0 if i > 1 else 20.0,
            "mem-max-rss-bytes": 10**9 * i,
        }
        for i in range(1, iterations + 1)
    ]
    (folder / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    if done:
        (folder / DONE_MARKER).write_text("5\n")
    return folder


def page_of(tmp_path: Path, *folders: Path) -> str:
    return write_report(open_runs(folders), tmp_path / "out").read_text(encoding="utf-8")


def cells(page: str, table: str) -> list[list[str]]:
    """The texts of the first table after the heading `table`, row by row."""
    part = page[page.index(f"<h2>{table}</h2>") :]
    rows = re.findall(r"<tr.*?</tr>", part[: part.index("</table>")], flags=re.DOTALL)
    cut = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, flags=re.DOTALL) for row in rows]
    return [[re.sub(r"<[^>]*>", "", cell).strip() for cell in row] for row in cut]


def test_one_run_in_numbers(tmp_path: Path) -> None:
    page = page_of(tmp_path, write_run(tmp_path / "a"))
    head, row = cells(page, "Outcome")
    found = dict(zip(head, row, strict=True))
    assert found == {
        "run": "a",
        "status": "finished",
        "iterations": "5",
        "tokens": "500",
        "time in iterations": "2.5 s",
        "tokens/s, median": "200",
        "peak memory": "5.00 GB (process)",
        "last lm loss": "1.0000",
        "lowest lm loss": "1.0000",
    }
    assert ["optimizer.lr", "0.001"] in cells(page, "Settings")
    assert "None: no result of <code>fusemega eval</code>" in page


def test_the_page_stands_alone_and_every_curve_is_a_png(tmp_path: Path) -> None:
    page = page_of(tmp_path, write_run(tmp_path / "a"), write_run(tmp_path / "b", 3))
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)|@import|<script|url\((?!#)""", page)
    names = {"lm-loss", "grad-norm", "learning-rate", "tokens-per-second", "iteration-time", "mem-max-rss-bytes"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {PAGE, LIST, *(f"{name}.png" for name in names)}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "out").glob("*.png"))
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == len(names)
    ids: list[str] = []
    for drawing in drawings:
        root = ET.fromstring(re.sub(r"xlink:href", "href", drawing))
        ids += [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids)), "two drawings share an id: one would be drawn with the other's parts"
    assert charts._INK not in page and "currentColor" in page


def test_side_by_side(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"sweep/{i}/run", 2 + i, optimizer__lr=1e-3 * (i + 1)) for i in range(8)]
    page = page_of(tmp_path, *folders)
    rows = cells(page, "Outcome")[1:]
    assert [row[0] for row in rows] == [f"{i}/run" for i in range(8)]
    assert [row[2] for row in rows] == [str(2 + i) for i in range(8)]
    assert cells(page, "Settings that differ")[1:] == [["optimizer.lr", *(f"{1e-3 * (i + 1):.12g}" for i in range(8))]]
    assert ["training.train_iters", "5"] in cells(page, "All settings"), "one cell where all runs agree"
    assert page.count('class="differs"') == 1
    (loss,) = [chart for chart in charts_of(open_runs(folders)) if chart.file == "lm-loss"]
    assert loss.x_label == "iteration"
    assert [len(curve.points) for curve in loss.curves] == [2 + i for i in range(8)]
    assert len({charts.colour(curve.index) for curve in loss.curves}) == 8


def test_losses_of_other_batches_are_over_tokens(tmp_path: Path) -> None:
    runs = open_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", training__global_batch_size=8)])
    loss, norm = charts_of(runs)[:2]
    assert loss.x_label == "training tokens" and norm.x_label == "iteration"
    assert [x for x, _ in loss.curves[0].points] == [100, 200, 300, 400, 500]


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    stopped = write_run(tmp_path / "stopped", 3, done=False, tail='{"iteration": 4, "lm l')
    bare = write_run(tmp_path / "bare", 0, done=False, tail='{"iteration": 1, "lm loss": NaN}\n{"iteration": 2}\n')
    empty = write_run(tmp_path / "empty", 0, done=False)
    (empty / METRICS_FILE).unlink()
    page = page_of(tmp_path, stopped, bare, empty)
    assert "not finished: 3 of 5 iterations" in page and "not finished: 0 of 5 iterations" in page
    assert "stopped: the last line of metrics.jsonl is torn and left out" in page
    assert "values that are not finite are gaps in the curves: lm loss at 1" in page
    assert "throughput was not recorded; memory was not recorded" in page
    assert "empty: no metrics.jsonl: nothing was recorded" in page
    assert [row[3:] for row in cells(page, "Outcome")[2:]] == [["–"] * 6] * 2
    assert "nan" not in page.lower().replace("finance", "")


def test_evaluations_and_a_quickstart(tmp_path: Path) -> None:
    quickstart = tmp_path / "quick"
    write_run(quickstart / "fused")
    write_run(quickstart / "control")
    measured = {"target": 1.5, "control": 1.25, "fused": 1.125, "teacher": 0.5}
    (quickstart / "summary.json").write_text(json.dumps({"bits_per_byte": measured}))
    found = {"loss": 1.0, "perplexity": math.e, "bits_per_byte": 0.75, "tokens": 1234, "bytes": 5000, "samples": 7}
    (quickstart / "fused/mine.json").write_text(json.dumps(found))
    rows = cells(page_of(tmp_path, quickstart), "Evaluations")
    assert ["control", "held out", "1.2500"] in [row[:3] for row in rows]
    assert ["fused", "held out", "1.1250"] in [row[:3] for row in rows]
    assert ["control", "target (not trained here)", "1.5000"] in [row[:3] for row in rows]
    (mine,) = [dict(zip(rows[0], row, strict=True)) for row in rows if "mine" in row]
    assert mine["bits per byte"] == "0.7500" and mine["tokens"] == "1,234" and mine["perplexity"] == "2.7183"


def test_names_are_text_and_not_markup(tmp_path: Path) -> None:
    page = page_of(tmp_path, write_run(tmp_path / "<b>$x_1$&amp"), write_run(tmp_path / "b", optimizer__lr="<i>"))
    assert "<b>$" not in page and "<i>" not in page and "&lt;b&gt;$x_1$&amp;amp" in page


def test_an_older_report_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    page_of(tmp_path, run)
    (tmp_path / "out/mine.png").write_text("")
    with pytest.raises(UserError, match="mine.png: not a file of the report"):
        page_of(tmp_path, run)
    (tmp_path / "out/mine.png").unlink()
    page_of(tmp_path, run)
    assert not list(tmp_path.glob("*.incomplete"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    with pytest.raises(UserError, match="mine: exists and is not a report"):
        write_report(open_runs([run]), tmp_path / "mine")


def test_thinning_keeps_extremes_order_and_gaps() -> None:
    points = [(float(i), math.sin(i)) for i in range(10_000)]
    points[4321] = (4321.0, 9.0)
    points[7777] = (7777.0, -9.0)
    points[5000:5100] = [(float(i), math.nan) for i in range(5000, 5100)]
    kept = charts.thinned(points, 100)
    assert len(kept) <= 100 and (4321.0, 9.0) in kept and (7777.0, -9.0) in kept
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert set(kept) - {p for p in kept if math.isnan(p[1])} <= set(points)
    assert charts.thinned(points[:100], 100) == points[:100]


def test_running_mean_is_the_mean_of_the_neighbours() -> None:
    points = [(float(i), float(i * i)) for i in range(300)]
    points[150] = (150.0, math.nan)
    mean = charts.running_mean(points)
    for i in (0, 1, 75, 148, 299):
        near = [y for _, y in points[max(0, i - 3) : i + 4] if not math.isnan(y)]
        assert mean[i] == (float(i), pytest.approx(sum(near) / len(near)))
    assert math.isnan(mean[150][1])


def test_the_command_needs_no_torch(tmp_path: Path) -> None:
    probe = (
        "import sys; from fusemega.cli import main\n"
        f"try: main(['report', {str(write_run(tmp_path / 'a'))!r}, '--out', {str(tmp_path / 'out')!r}])\n"
        "except SystemExit as stop: print('status', stop.code)\n"
        "print(*[m for m in ('torch', 'transformers', 'megatron') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.stdout.split() == ["wrote", str(tmp_path / "out" / PAGE), "status", "0"], run.stderr


def test_evaluations_on_the_way_are_curves(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    rows = [{"iteration": i, "loss": 4.0 - i / 5, "bits_per_byte": 2.0 - i / 10} for i in (0, 2, 5)]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run,) = open_runs([folder])
    assert run.series("validation loss") == [(0, 4.0), (2, 3.6), (5, 3.0)]
    assert run.series("validation bits per byte")[-1] == (5, 1.5)
    assert run.iterations == 5 and len(run.series("lm loss")) == 5
    by_file = {chart.file: chart for chart in charts_of([run])}
    assert by_file["validation-loss"].curves[0].points == [(0, 4.0), (2, 3.6), (5, 3.0)]
    assert "last lm loss" in page_of(tmp_path, folder)


def test_what_monitoring_found_is_shown(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    rows = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    for row in rows[1:4]:
        row |= {"gpu/PowerUsage max": 650_000.0 + row["iteration"], "ranks/slowest": 1.0, "ranks/slowest ratio": 1.5}
    (folder / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    state = RankState(
        rank=1,
        world_size=2,
        host="node7",
        pid=4711,
        device="cuda:1",
        started=1.0,
        time=2.0,
        beats=3,
        iteration=5,
        train_iters=5,
        phase="step",
        since=1.0,
        detail=None,
        moved=2.0,
        collective="",
        code="",
        ended=None,
        device_state={},
        device_worst={"PowerUsage": 650_000.0, "Temperature": 71.0},
        device_errors=["XID 79: <lost>"],
    )
    (folder / "monitor").mkdir()
    (folder / "monitor" / "rank-00001.json").write_text(state.as_json())
    (power, ratio) = charts_of(open_runs([folder]))[-2:]
    assert power.title == "GPU power, W" and power.curves[0].points[0] == (2, pytest.approx(650.002))
    assert ratio.title == "Slowest rank" and [y for _, y in ratio.curves[0].points] == [1.5] * 3
    page = page_of(tmp_path, folder)
    head, row = cells(page, "Ranks")
    assert dict(zip(head, row, strict=True)) == {
        "rank": "1",
        "node": "node7",
        "device": "cuda:1",
        "iterations": "5",
        "ended": "not ended; last in step after iteration 5",
        "most so far": "GPU power 650 W; GPU temperature 71 degrees Celsius",
        "errors of the device": "XID 79: &lt;lost&gt;",
    }
