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

from gpu.card import Card

LISTED = 20
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
    """The `LISTED` operations that take the device most of its time in one step, with their share of all."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it says on stderr that it starts and stops
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if card.is_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        step()
        card.wait()
    rows: list[Any] = list(profiler.key_averages())
    taken = {row.key: float(row.self_device_time_total if card.is_gpu else row.self_cpu_time_total) for row in rows}
    total = sum(taken.values()) or 1.0
    calls = {row.key: int(row.count) for row in rows}
    first = sorted(taken, key=lambda key: -taken[key])[:LISTED]
    return [
        {"name": key, "calls": calls[key], "ms": round(taken[key] / 1000, 3), "share": round(taken[key] / total, 4)}
        for key in first
    ]
