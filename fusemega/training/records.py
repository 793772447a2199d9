"""The files a training run leaves in its folder for others to read, without torch."""

from __future__ import annotations

import json
from pathlib import Path

RUN_RECORD = "run.json"
METRICS_FILE = "metrics.jsonl"
DONE_MARKER = "done"  # a job script asks for it before it requeues

# What an iteration cost, and not what it computed: never the same twice.
TIME, THROUGHPUT = "iteration-time", "tokens-per-second"
# The most any rank has held so far, bytes: of a GPU (Megatron's name), or the resident set of a process.
GPU_MEMORY, CPU_MEMORY = "mem-max-allocated-bytes", "mem-max-rss-bytes"
COSTS = (TIME, THROUGHPUT, GPU_MEMORY, CPU_MEMORY)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's `metrics.jsonl`; a last line cut short by a kill is left out."""
    rows = []
    path = folder / METRICS_FILE
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
