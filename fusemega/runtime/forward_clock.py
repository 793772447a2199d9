"""How long this rank's forward passes take: of all parts of a step, the one that depends least on other ranks.

On a GPU the time is between two CUDA events, so the host waits for nothing; they are read when it has waited for the
step's loss anyway. On a CPU it is the host's time. Backward, gradients and optimizer are left out, because there a rank
waits for others. Inside a forward pass, tensor-, context- and expert-parallel ranks wait for each other too, and so
share the time of the slowest of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class ForwardClock:
    """Adds up the forward passes of this rank.

    Args:
        device: where they run.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._pairs: list[tuple[Any, Any]] = []
        self._free: list[Any] = []
        self._seconds, self._tokens = 0.0, 0

    @contextmanager
    def forward(self, tokens: int) -> Iterator[None]:
        """One forward pass of so many tokens."""
        self._tokens += tokens
        if not self._on_gpu:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started
            return
        begin, end = (self._free.pop() if self._free else torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._pairs.append((begin, end))

    def settle(self) -> None:
        """Reads the events that the device has passed; called once a step, after the host has waited for its loss."""
        while self._pairs and self._pairs[0][1].query():
            begin, end = self._pairs.pop(0)
            self._seconds += begin.elapsed_time(end) / 1000
            self._free += (begin, end)

    def take(self) -> tuple[float, int]:
        """Seconds and tokens since the last call."""
        found = self._seconds, self._tokens
        self._seconds, self._tokens = 0.0, 0
        return found
