"""Training runs for a report: what their folders hold, and what is missing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from fusemega.errors import UserError
from fusemega.files.json_files import read_json
from fusemega.monitoring.ranks import RankState, read_ranks
from fusemega.training.profile_table import ProfileTable, read_profile
from fusemega.training.records import (
    CPU_MEMORY,
    DONE_MARKER,
    GPU_MEMORY,
    METRICS_FILE,
    RUN_RECORD,
    THROUGHPUT,
    TIME,
    read_evaluations,
    read_rows,
)

SUMMARY = "summary.json"  # of a quickstart folder


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        path: its folder.
        name: the end of the path that tells it from the other runs of the report.
        settings: the run file's values by dotted key.
        rows: the rows of metrics.jsonl, in order, with the evaluations during the training.
        finished: whether it reached its last iteration.
        evaluations: name -> what `fusemega eval` wrote into the folder, or what a quickstart measured of the run.
        profiles: what `training.profile` recorded, a table for each rank.
        ranks: what its ranks have last written about themselves.
        notes: remarks for the reader: rows that are torn or not finite, values that were never recorded.
    """

    path: Path
    name: str
    settings: dict[str, Any]
    rows: list[dict[str, float]]
    finished: bool
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    profiles: list[ProfileTable] = field(default_factory=list)
    ranks: list[RankState] = field(default_factory=list)

    def series(self, metric: str) -> list[tuple[int, float]]:
        """(iteration, value) of every row that has the metric."""
        return [(int(row["iteration"]), row[metric]) for row in self.rows if metric in row]

    def values(self, metric: str) -> list[float]:
        """The metric's finite values, in order."""
        return [value for _, value in self.series(metric) if math.isfinite(value)]

    @property
    def iterations(self) -> int:
        return int(self.rows[-1]["iteration"]) if self.rows else 0

    @property
    def status(self) -> str:
        """The word "finished", or how far the run came."""
        if self.finished:
            return "finished"
        planned = self.settings.get("training.train_iters")
        return f"not finished: {self.iterations} of {planned or 'an unknown number of'} iterations"

    @property
    def memory(self) -> tuple[float, str] | None:
        """(the most bytes that any rank held, "GPU" or "process"); None if no row has them."""
        for metric, what in ((GPU_MEMORY, "GPU"), (CPU_MEMORY, "process")):
            if values := self.values(metric):
                return max(values), what
        return None

    @property
    def tokens(self) -> float | None:
        """Tokens trained on."""
        values = self.values("tokens")
        return sum(values) if values else None

    @property
    def seconds(self) -> float | None:
        """Time inside iterations, without checkpoints and start."""
        values = self.values(TIME)
        return sum(values) if values else None

    @property
    def throughput(self) -> float | None:
        """Median tokens a second of all ranks."""
        values = self.values(THROUGHPUT)
        return median(values) if values else None


def open_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs of these folders; a quickstart's folder stands for its trained arms.

    Raises:
        UserError: no folder of a run, a damaged file (names it, and the line), one run twice, no iteration in any.
    """
    folders: list[tuple[Path, dict[str, dict[str, float]]]] = []
    for path in paths:
        folders += _arms(path) if (path / SUMMARY).is_file() else [(path, {})]
    resolved = [folder.resolve() for folder, _ in folders]
    for folder in resolved:
        if resolved.count(folder) > 1:
            raise UserError(f"{folder}: given twice")
    names = _short_names(resolved)
    runs = [_open(folder, name, extra) for (folder, extra), name in zip(folders, names, strict=True)]
    if not any(run.rows for run in runs):
        raise UserError(f"{', '.join(str(run.path) for run in runs)}: no iteration is recorded yet, nothing to show")
    return runs


def metrics_of(runs: Iterable[Run]) -> list[str]:
    """Every metric that some row has, in the order of the files, without the columns that only count."""
    found = {name: None for run in runs for row in run.rows for name in row}
    return [name for name in found if name not in ("iteration", "consumed-samples", "tokens")]


def _open(folder: Path, name: str, evaluations: dict[str, dict[str, float]]) -> Run:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of a training run")
    if not (folder / RUN_RECORD).is_file():
        raise UserError(f"{folder}: not the folder of a training run (no {RUN_RECORD})")
    record = read_json(folder / RUN_RECORD)
    if not isinstance(record.get("run"), dict):
        raise UserError(f"{folder / RUN_RECORD}: has no settings under the key 'run'")
    rows, notes = _read_rows(folder / METRICS_FILE)
    found = {**evaluations, **dict(_evaluations(folder))}
    finished = (folder / DONE_MARKER).is_file()
    rows = _with_validation(rows, read_evaluations(folder))
    return Run(
        folder, name, dict(_flat(record["run"])), rows, finished, found, notes, read_profile(folder), read_ranks(folder)
    )


def _with_validation(
    rows: Sequence[dict[str, float]], evaluations: Sequence[dict[str, float]]
) -> list[dict[str, float]]:
    """The rows with each evaluation's figures in the row of its iteration; before the first update, in a new row."""
    joined = {int(row["iteration"]): dict(row) for row in rows}
    for found in evaluations:
        row = joined.setdefault(int(found["iteration"]), {"iteration": found["iteration"]})
        row["validation loss"] = found["loss"]
        if "bits_per_byte" in found:  # of text
            row["validation bits per byte"] = found["bits_per_byte"]
        else:  # of groups: the objective's metrics
            row |= {f"validation {name}": found[name] for name in found.keys() - {"iteration", "loss", "groups"}}
    return [joined[iteration] for iteration in sorted(joined)]


def _read_rows(path: Path) -> tuple[list[dict[str, float]], list[str]]:
    """The rows, and notes on them."""
    if not path.is_file():
        return [], [f"no {METRICS_FILE}: nothing was recorded"]
    rows, torn = read_rows(path)
    notes = []
    if torn:
        notes.append(f"the last line of {METRICS_FILE} is torn and left out, as a killed run leaves it")
    if not rows:
        notes.append("no iteration is recorded yet")
    unsound = [f"{name} at {row['iteration']}" for row in rows for name, x in row.items() if not math.isfinite(x)]
    if unsound:
        more = f" and {len(unsound) - 3} more" if len(unsound) > 3 else ""
        notes.append(f"values that are not finite are gaps in the curves: {', '.join(unsound[:3])}{more}")
    if rows and THROUGHPUT not in rows[-1]:
        notes.append("throughput was not recorded")
    if rows and not {GPU_MEMORY, CPU_MEMORY} & rows[-1].keys():
        notes.append("memory was not recorded")
    return rows, notes


def _evaluations(folder: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """JSON files of the folder that `fusemega eval` wrote."""
    for path in sorted(folder.glob("*.json")):
        if path.name != RUN_RECORD:
            value = read_json(path, finite=False)
            if isinstance(value.get("bits_per_byte"), (int, float)):
                yield path.stem, {key: x for key, x in value.items() if isinstance(x, (int, float))}


def _arms(quickstart: Path) -> list[tuple[Path, dict[str, dict[str, float]]]]:
    """The trained arms of a quickstart, each with the held-out bits per byte that were measured of it."""
    measured = read_json(quickstart / SUMMARY).get("bits_per_byte")
    if not isinstance(measured, dict) or not all(type(value) in (int, float) for value in measured.values()):
        raise UserError(f"{quickstart / SUMMARY}: has no bits_per_byte; not the summary of a quickstart")
    held_out = {name: {"bits_per_byte": value} for name, value in measured.items()}
    arms = [name for name in measured if (quickstart / name / RUN_RECORD).is_file()]
    if not arms:
        raise UserError(f"{quickstart}: no arm of this quickstart has a {RUN_RECORD}")
    untrained = {f"{name} (not trained here)": value for name, value in held_out.items() if name not in arms}
    return [(quickstart / name, {"held out": held_out[name], **untrained}) for name in arms]


def _flat(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _short_names(folders: Sequence[Path]) -> list[str]:
    """For each folder, as few of its last parts as tell it from the others."""
    names = []
    for folder in folders:
        for count in range(1, len(folder.parts) + 1):
            name = "/".join(folder.parts[-count:])
            if sum("/".join(other.parts[-count:]) == name for other in folders) == 1:
                break
        names.append(name)
    return names
