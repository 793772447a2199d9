"""What a training step consists of: where the host waits for the card, and the operations that take its time."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fusemega.training.profile import table_of
from gpu.card import Card

_SAID = "synchronizing CUDA operation"


def synchronisations(step: Callable[[], object]) -> Counter[str]:
    """Where in the code the host waits for the card, and how often, in one step on a GPU.

    By torch's own debug mode. It does not see collectives, nor calls of `torch.cuda.synchronize`.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{_short(w.filename)}:{w.lineno}" for w in caught if _SAID in str(w.message))


def _short(path: str) -> str:
    return "/".join(Path(path).parts[-3:])


def top_operations(card: Card, step: Callable[[], object]) -> list[dict[str, Any]]:
    """The operations that take the device most of its time in one step, with their share of all."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it says on stderr that it starts and stops
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if card.is_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        step()
        card.wait()
    table = table_of(profiler, rank=0, start=0, stop=1)
    rows = [(row, row.gpu_us if card.is_gpu else row.cpu_us) for row in table.operations]
    total = (table.gpu_us if card.is_gpu else table.cpu_us) or 1.0
    return [
        {"name": row.name, "calls": row.calls, "ms": round(us / 1000, 3), "share": round(us / total, 4)}
        for row, us in rows
    ]
