"""One page about several runs: a folder with `report.html`, which needs no other file, and its curves as PNG files."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from fusemega import __version__
from fusemega.files.output import INSIDE, check_writable, publish, scratch
from fusemega.files.owned import check_replaceable, remove_listed, write_list
from fusemega.report import charts
from fusemega.report.charts import Chart, Curve, short
from fusemega.report.page_template import STYLE, TEMPLATE
from fusemega.report.runs import Run, metrics_of
from fusemega.report.watched import RANK_HEAD, is_charted, rank_cells, title_of
from fusemega.training.profile_table import ProfileTable
from fusemega.training.records import CPU_MEMORY, GPU_MEMORY, MONITORED, THROUGHPUT, TIME

PAGE = "report.html"
_ABSENT = "–"
_TITLES = {
    "grad-norm": ("Gradient norm", "global, before clipping"),
    "learning-rate": ("Learning rate", ""),
    THROUGHPUT: ("Throughput, tokens a second", "all ranks together; the first iterations include warming up"),
    TIME: ("Time of an iteration, seconds", ""),
    GPU_MEMORY: ("Peak GPU memory, GB", "the most any rank has held so far, as torch's allocator counts"),
    CPU_MEMORY: ("Peak memory of a process, GB", "the most any rank has held so far, resident set"),
}
_MEMORY = (GPU_MEMORY, CPU_MEMORY)


def write_report(runs: Sequence[Run], out: Path) -> Path:
    """Writes the folder `out`, complete or not at all; an older report there is replaced. Returns the page.

    Raises:
        UserError: `out` holds something else than a report, or cannot be written.
    """
    drawn = charts_of(runs)
    return write_page(out, render(runs, drawn), drawn)


def write_page(out: Path, page: str, drawn: Sequence[Chart]) -> Path:
    """`write_report` for any page and its charts."""
    check_out(out)
    with scratch(out) as place:
        check_out(out)  # again: another process may have written there before this one had the lock
        made = place / INSIDE
        made.mkdir()
        for chart in drawn:
            (made / f"{chart.file}.png").write_bytes(charts.png(chart))
        (made / PAGE).write_text(page, encoding="utf-8")
        write_list(made, "report")
        real = Path(os.path.realpath(out))
        if real.is_dir():
            remove_listed(real)  # a rename cannot replace a folder that is not empty
        publish(made, real)
    return out / PAGE


def check_out(out: Path, inputs: Sequence[Path] = ()) -> None:
    """Refuses a folder that holds something else than an older report, or that is or holds something that is read."""
    check_replaceable(out, "report", inputs)
    check_writable(out)


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """A chart for every metric: losses first, then the optimizer's, then what it cost."""
    metrics = metrics_of(runs)
    losses = [name for name in metrics if name.endswith("loss") or name.startswith("validation")]
    costs = [name for name in (THROUGHPUT, TIME, *_MEMORY) if name in metrics]
    watched = [name for name in metrics if name.startswith(MONITORED) and is_charted(name)]
    others = [name for name in metrics if name not in (*losses, *costs) and not name.startswith(MONITORED)]
    # Iterations of different batches are not comparable; tokens are.
    by_tokens = len({_batch(run) for run in runs}) > 1 and all(run.tokens for run in runs if run.rows)
    drawn = []
    for metric in [*losses, *others, *costs, *watched]:
        title, note = _TITLES.get(metric, (metric, "nats" if metric.endswith("loss") else ""))
        if metric in watched:
            title, note, _ = title_of(metric)
        tokens = by_tokens and metric in losses
        curves = [Curve(run.name, i, _points(run, metric, tokens)) for i, run in enumerate(runs) if run.values(metric)]
        if curves:
            x_label = "training tokens" if tokens else "iteration"
            file = metric.replace(" ", "-").replace("/", "-")
            drawn.append(Chart(file, title, note, x_label, curves, short, from_zero=metric in (THROUGHPUT, *_MEMORY)))
    return drawn


def render(runs: Sequence[Run], drawn: Sequence[Chart]) -> str:
    """The page's HTML."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    keys = list({key: None for run in runs for key in run.settings})
    settings = [(key, [_written(run.settings.get(key, _ABSENT)) for run in runs]) for key in keys]
    trained = (name for name in metrics_of(runs) if name.endswith("loss") and not name.startswith("validation"))
    loss = next(trained, None)
    return environment.from_string(TEMPLATE).render(
        version=__version__,
        style=STYLE,
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} training runs",
        runs=runs,
        colours=[charts.colour(i) for i in range(len(runs))],
        outcome_head=_OUTCOME_HEAD if loss is None else [*_OUTCOME_HEAD, f"last {loss}", f"lowest {loss}"],
        outcome=[_outcome(run, loss) for run in runs],
        evaluations=_evaluations(runs),
        profiles=[(run, i, table, _operations(table)) for i, run in enumerate(runs) for table in run.profiles],
        rank_head=RANK_HEAD,
        ranks=[(run, i, [rank_cells(state) for state in run.ranks]) for i, run in enumerate(runs) if run.ranks],
        figures=[(chart, charts.svg(chart)) for chart in drawn],
        differing=[row for row in settings if len(set(row[1])) > 1],
        settings=settings,
    )


_OUTCOME_HEAD = ["status", "iterations", "tokens", "time in iterations", "tokens/s, median", "peak memory"]


def _outcome(run: Run, loss: str | None) -> list[str]:
    losses = run.values(loss) if loss else []
    memory = _ABSENT if run.memory is None else f"{run.memory[0] / 1e9:.2f} GB ({run.memory[1]})"
    cells = [
        run.status,
        f"{run.iterations:,}",
        _ABSENT if run.tokens is None else f"{run.tokens:,.0f}",
        _ABSENT if run.seconds is None else _clock(run.seconds),
        _ABSENT if run.throughput is None else f"{run.throughput:,.0f}",
        memory,
    ]
    return [*cells, *([f"{losses[-1]:.4f}", f"{min(losses):.4f}"] if losses else [_ABSENT] * 2)] if loss else cells


def _evaluations(runs: Sequence[Run]) -> dict[str, Any] | None:
    """The measured figures, a line for each evaluation; None if there are none."""
    lines = [(run.name, i, name, found) for i, run in enumerate(runs) for name, found in run.evaluations.items()]
    keys = list({key: None for *_, found in lines for key in found})
    cells = [(run, i, name, [_number(found.get(key)) for key in keys]) for run, i, name, found in lines]
    return {"keys": [key.replace("_", " ") for key in keys], "lines": cells} if lines else None


def _operations(table: ProfileTable) -> list[list[str]]:
    """A line for each operation, as the page shows it; without a GPU there are no GPU times."""

    def share(part: float, whole: float) -> str:
        return f"{part / whole:.1%}" if whole else _ABSENT

    return [
        [
            row.name if len(row.name) <= 120 else f"{row.name[:119]}…",
            f"{row.calls:,}",
            f"{row.cpu_us / 1e3:,.2f}",
            share(row.cpu_us, table.cpu_us),
            f"{row.gpu_us / 1e3:,.2f}" if table.gpu_us else _ABSENT,
            share(row.gpu_us, table.gpu_us),
        ]
        for row in table.operations
    ]


def _points(run: Run, metric: str, tokens: bool) -> list[tuple[float, float]]:
    scale = 1e-9 if metric in _MEMORY else title_of(metric)[2] if metric.startswith(MONITORED) else 1.0
    so_far, points = 0.0, []
    for row in run.rows:
        so_far += row.get("tokens", 0)
        if metric in row:
            points.append((so_far if tokens else row["iteration"], row[metric] * scale))
    return points


def _batch(run: Run) -> tuple[str, ...]:
    keys = ("training.global_batch_size", "data.seq_length", "data.path")
    return tuple(_written(run.settings.get(key)) for key in keys)


def _written(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.12g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _number(value: float | None) -> str:
    if value is None:
        return _ABSENT
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
