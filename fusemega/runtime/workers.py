"""A few processes on this machine that share a list of work items, and the peak memory of all of them."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing import active_children, get_context
from typing import TypeVar

from fusemega.errors import UserError
from fusemega.runtime import lifeline

T = TypeVar("T")
R = TypeVar("R")


def default_workers() -> int:
    """One for each core, but at most 8, which is what a disk can feed."""
    return min(8, len(os.sched_getaffinity(0)))


class WorkerLost(UserError):
    """One of the processes was ended from outside."""


class Workers:
    """`map` over processes; with one worker, over this process.

    Attributes:
        peak_bytes: the sum of every process's own peak of resident memory so far, this one's included; never less than
            the peak of their sum.
    """

    def __init__(self, pool: ProcessPoolExecutor | None, count: int) -> None:
        self._pool = pool
        self._peaks: dict[int, int] = {}
        self.count = count

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
        """(item, result) in the order in which they are finished; an item's exception is raised here.

        Only a few items run ahead of the caller. So it has seen (and recorded) what is finished before many more items
        begin, and a disk that fills up meanwhile costs only those few.

        Args:
            function: one that a module defines, because it, the items and the results are pickled. If processes are
                spawned, that module should import little.
            items: started in this order.

        Raises:
            WorkerLost: a process has ended without a result.
        """
        if self._pool is None:
            for item in items:
                yield item, function(item)
            return
        waiting: dict[Future[tuple[R, int, int]], T] = {}
        left = iter(items)
        try:
            while True:
                for item in islice(left, 2 * self.count - len(waiting)):
                    waiting[self._pool.submit(partial(_measured, function), item)] = item
                if not waiting:
                    return
                # Finished items come before failed ones, so that the caller can keep them.
                done = wait(waiting, return_when=FIRST_COMPLETED).done
                for future in sorted(done, key=lambda future: future.exception() is not None):
                    result, process, peak = future.result()
                    self._peaks[process] = peak
                    yield waiting.pop(future), result
        except BrokenProcessPool:
            raise WorkerLost(
                f"one of {self.count} worker processes was ended from outside, as the kernel does where memory is "
                f"short; fewer --workers need less"
            ) from None
        finally:
            for future in waiting:
                future.cancel()

    @property
    def peak_bytes(self) -> int:
        return peak_memory() + sum(self._peaks.values())


@contextmanager
def start_workers(count: int, forked: bool = False) -> Iterator[Workers]:
    """`count` processes, which end with the block; at once if it ends in an error or this process is killed.

    Args:
        count: at least 1.
        forked: they begin with this process's memory, and so with its modules and globals; nothing here may use a GPU.
            Else they are spawned: a fork would carry the memory and the locks of this process's threads along.
    """
    if count == 1:
        yield Workers(None, 1)
        return
    context = get_context("fork" if forked else "spawn")
    others = set(active_children())
    with ProcessPoolExecutor(count, mp_context=context, initializer=_follow_parent, initargs=(os.getpid(),)) as pool:
        try:
            yield Workers(pool, count)
        except BaseException:
            for process in set(active_children()) - others:
                process.terminate()  # nobody will take their results
            raise


def peak_memory() -> int:
    """Bytes of resident memory that this process has taken at most."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except OSError:  # not Linux: the same figure, but a child's begins with its parent's
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _measured(function: Callable[[T], R], item: T) -> tuple[R, int, int]:
    try:
        return function(item), os.getpid(), peak_memory()
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # it could not be raised again in the parent, which would take the process for killed
            raise RuntimeError("".join(traceback.format_exception(error))) from None
        raise


def _follow_parent(parent: int) -> None:
    """Ends this process with its parent; a pool's processes would else wait for work for ever. They ignore Ctrl-C: the
    parent ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lifeline.die_with(parent)
    lifeline.keep_children()
