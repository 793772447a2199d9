"""A plan, executed: blocks through the method on several threads, into files that are whole when the last is done.

Work is cut into tasks of a few blocks. A job's pass starts when its pass before is over; meanwhile the workers have
other jobs' blocks. Threads are enough: torch lets go of Python's lock while it computes, and a block's operations are
long beside it. Each thread computes alone (`torch.set_num_threads(1)`), so a result never depends on how torch would
have split an operation.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fusemega.checkpoint.ranges import RangeWriter
from fusemega.errors import UserError
from fusemega.merge.journal import Journal
from fusemega.merge.method import Block, Job, Merge, Pass
from fusemega.merge.plan import MergePlan, PlannedTensor
from fusemega.merge.sources import check_finite, load_block

TASK_ELEMENTS = 1 << 20
JOURNAL_SECONDS = 1.0
Progress = Callable[[int], None]
"""Called with the number of elements that have just been written."""


@dataclass(frozen=True)
class _Place:
    """Where a block is."""

    tensor: PlannedTensor
    index: int
    start: int
    count: int


class _Run:
    """One job on its way through its passes."""

    def __init__(self, job: Job, plan: MergePlan, block_elements: int) -> None:
        self.job = job
        self.places: list[_Place] = []
        for spec in job.tensors:
            for start, count in plan.blocks(spec, block_elements):
                self.places.append(_Place(plan.tensors[spec.name], len(self.places), start, count))
        self._has_base = plan.has_base
        self._steps = plan.method.passes(job)
        self._pass: Pass | None = None
        self._checked = False
        self.merge: Merge | None = None
        self._results: list[Any] = []
        self._left = 0

    def advance(self) -> list[list[_Place]]:
        """Begins the next pass; returns its tasks."""
        try:
            if self._pass is None:
                self._pass = next(self._steps)
            else:
                self._checked = True
                self._pass = self._steps.send(self._results)
        except StopIteration as end:
            self._checked = self._pass is not None
            self.merge = end.value
        self._results = [None] * len(self.places)
        tasks: list[list[_Place]] = []
        room = 0
        for place in self.places:
            if room < place.count:
                tasks.append([])
                room = max(TASK_ELEMENTS, place.count)
            tasks[-1].append(place)
            room -= place.count
        self._left = len(tasks)
        return tasks

    def work(self, task: list[_Place], writer: RangeWriter) -> list[Any]:
        """One task, on a worker's thread."""
        return [self._one(place, writer) for place in task]

    def _one(self, place: _Place, writer: RangeWriter) -> Any:
        tensor = place.tensor
        values = load_block(tensor.sources, place.start, place.count, tensor.computed_in, self._has_base)
        if not self._checked:
            check_finite(tensor.sources, values, place.start)
        base, models = (values[0], values[1:]) if self._has_base else (None, values)
        block = Block(tensor.spec, place.index, place.start, base, models)
        if self.merge is None:
            assert self._pass is not None
            return self._pass(block)
        merged, agreed = self.merge.apply(block)
        narrow = merged.to(tensor.dtype)
        if tensor.dtype.itemsize < merged.element_size() and not torch.isfinite(narrow.sum(dtype=torch.float32)):
            if not torch.isfinite(narrow).all():
                raise UserError(f"tensor {tensor.spec.name}: merged values are too large for {tensor.dtype}")
        writer.write(tensor.spec.name, place.start, narrow)
        return agreed

    def finish(self, task: list[_Place], results: list[Any]) -> bool:
        """Takes a task's results; whether the pass is over."""
        for place, result in zip(task, results, strict=True):
            self._results[place.index] = result
        self._left -= 1
        return self._left == 0

    def report(self) -> list[dict[str, Any]]:
        """What is said of each tensor, once all is merged."""
        assert self.merge is not None
        agreed = sum(self._results)
        extra = {"sign_agreement": agreed / self.merge.pairs} if self.merge.pairs else {}
        rows = []
        for spec in self.job.tensors:
            rows.append({"tensor": spec.name, "shape": list(spec.shape)} | dict(self.merge.report) | extra)
        return rows


def execute(
    plan: MergePlan,
    writer: RangeWriter,
    journal: Journal,
    *,
    workers: int,
    block_elements: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Merges every job that the journal does not have yet.

    Returns:
        The report's rows, one a tensor, in the plan's order.

    Raises:
        UserError: a source cannot be read or holds NaN or infinities.
    """
    waiting = iter([job for job in plan.jobs if job.tensors[0].name not in journal.done])
    rows = dict(journal.done)
    ready: deque[tuple[_Run, list[_Place]]] = deque()
    running: dict[Future[list[Any]], tuple[_Run, list[_Place]]] = {}
    unsaved: list[tuple[str, list[dict[str, Any]]]] = []
    saved_at = time.monotonic()
    with _one_thread_each(), ThreadPoolExecutor(workers) as pool:
        try:
            while True:
                while len(running) < 2 * workers:
                    if not ready:
                        job = next(waiting, None)
                        if job is None:
                            break
                        run = _Run(job, plan, block_elements)
                        ready.extend((run, task) for task in run.advance())
                    run, task = ready.popleft()
                    running[pool.submit(run.work, task, writer)] = run, task
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run, task = running.pop(future)
                    over = run.finish(task, future.result())
                    if run.merge is not None:
                        progress(sum(place.count for place in task))
                    if over and run.merge is None:
                        ready.extendleft((run, task) for task in reversed(run.advance()))
                    elif over:
                        name = run.job.tensors[0].name
                        rows[name] = run.report()
                        unsaved.append((name, rows[name]))
                if unsaved and time.monotonic() - saved_at > JOURNAL_SECONDS:
                    writer.sync()
                    journal.add(unsaved)
                    unsaved, saved_at = [], time.monotonic()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    by_tensor = {row["tensor"]: row for job_rows in rows.values() for row in job_rows}
    return [by_tensor[name] for name in plan.tensors]


def default_workers() -> int:
    """One a core this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def _one_thread_each() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
