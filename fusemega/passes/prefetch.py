"""The next step's batch is built while this step is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Gives `build(0)`, `build(1)`, ... in order. For a GPU, a thread builds one of them ahead.

    The results are the same whether or not the thread runs ahead, and an error in `build(n)` is raised when number n is
    taken, never before. On a CPU nothing runs ahead: the thread would take turns with the computation.

    Args:
        build: a pure function of the number.
        device: the device that computes.
        end: the first number that will not be asked for.
        ahead: whether to run ahead; None: only for a GPU.
    """

    def __init__(self, build: Callable[[int], T], device: torch.device, end: int, ahead: bool | None = None) -> None:
        self._build, self._end = build, end
        self._thread: ThreadPoolExecutor | None = None
        if device.type == "cuda" if ahead is None else ahead:
            # Pinned memory belongs to the thread's current device.
            enter = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
            self._thread = ThreadPoolExecutor(1, "batches", enter)
        self._next: tuple[int, Future[T]] | None = None

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def take(self, number: int) -> T:
        """What `build(number)` gives; raises what it raises."""
        if self._thread is None:
            return self._build(number)
        if self._next is None or self._next[0] != number:
            self._submit(number)
        assert self._next is not None
        future, self._next = self._next[1], None
        taken = future.result()
        if number + 1 < self._end:
            self._submit(number + 1)
        return taken

    def settle(self) -> None:
        """Waits until nothing is being built, so that a process forked then inherits no lock held by the thread."""
        if self._next is not None:
            wait([self._next[1]])

    def close(self) -> None:
        """Ends the thread. What nobody took is dropped, errors included. Nothing can be taken any more."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def _submit(self, number: int) -> None:
        assert self._thread is not None
        self._next = (number, self._thread.submit(self._build, number))
