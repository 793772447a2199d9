"""The files a training run leaves in its folder for others to read, without torch."""

from __future__ import annotations

import re
from collections.abc import Container
from pathlib import Path

from fusemega.errors import UserError
from fusemega.files.json_files import read_lines

_NAME = re.compile(r"[\w ()./%:-]{1,200}")
RUN_RECORD = "run.json"
METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
SAVES_FILE = "saves.jsonl"  # how long each save took: a job script leaves that much time before its limit
DONE_MARKER = "done"  # a job script looks for it before it requeues
JOB_FOLDER = "slurm"  # made by a job script, before the run

# What an iteration cost, not what it computed: these differ even between runs that compute the same.
TIME, THROUGHPUT = "iteration-time", "tokens-per-second"
SAVE_TIME = "save-time"  # seconds from the begin of a save until its checkpoint has its name
# The most any rank has held so far, bytes: of a GPU (Megatron's name), or the resident set of a process.
GPU_MEMORY, CPU_MEMORY = "mem-max-allocated-bytes", "mem-max-rss-bytes"
# The rank that was slowest beside its peers, and how many times their median it needed.
SLOWEST, SLOWEST_RATIO = "ranks/slowest", "ranks/slowest ratio"
MONITORED = ("gpu/", "host/", "ranks/")  # how metrics begin that monitoring adds to some rows


class _Costs(Container[str]):
    """The names of such metrics."""

    def __contains__(self, name: object) -> bool:
        return name in (TIME, THROUGHPUT, GPU_MEMORY, CPU_MEMORY) or str(name).startswith(MONITORED)


COSTS = _Costs()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's `metrics.jsonl`; a last line cut short by a kill is left out.

    Raises:
        UserError: as `read_rows`.
    """
    return read_rows(folder / METRICS_FILE)[0]


def read_evaluations(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's `evaluations.jsonl`: `iteration` (0: before the first update) and what was found.

    Raises:
        UserError: as `read_rows`, or a row lacks what every evaluation finds.
    """
    path = folder / EVALUATIONS_FILE
    rows, _ = read_rows(path)
    for row in rows:
        if missing := {"loss"} - row.keys():
            raise UserError(f"{path}: the row of iteration {row['iteration']} has no {min(missing)}")
    return rows


def read_rows(path: Path) -> tuple[list[dict[str, float]], bool]:
    """The rows of such a file (none if there is no file), and whether an incomplete last line was left out.

    Raises:
        UserError: it cannot be read, or a line is no object of numbers with an iteration; names the line.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        ...     _ = file.write('{"iteration": 1, "lm loss": 2.5}\\n{"iteration": 2, "lm')
        ...     file.flush()
        ...     read_rows(Path(file.name))
        ([{'iteration': 1, 'lm loss': 2.5}], True)
    """
    if not path.exists():
        return [], False
    lines, torn = read_lines(path, finite=False)  # a loss may be infinite
    for number, row in lines:
        if not isinstance(row, dict) or not all(type(value) in (int, float) for value in row.values()):
            raise UserError(f"{path}:{number}: not a row of metrics (an object of numbers)")
        if odd := next((name for name in row if not _NAME.fullmatch(name)), None):
            raise UserError(f"{path}:{number}: a metric named {odd!r}; allowed: words, digits and ()-./%:")
        if type(row.get("iteration")) is not int or not 0 <= row["iteration"] < 1 << 53:
            raise UserError(f"{path}:{number}: the row has no iteration")
    return [row for _, row in lines], torn
