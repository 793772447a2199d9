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
from fusemega.merge.method import Block, Job, Merge, Pass, Sample
from fusemega.merge.plan import MergePlan, PlannedTensor
from fusemega.merge.sources import check_finite, load_block
from fusemega.runtime.memory import keep_freed_memory

TASK_ELEMENTS = 1 << 20
JOURNAL_SECONDS = 1.0
SAMPLE_PIECES = 16
KEPT_BYTES = 31 << 20  # more than any vector of a block
Progress = Callable[[int], None]
"""Called with the number of elements that have just been written."""


@dataclass(frozen=True)
class _Place:
    """Where a block is: in most passes one piece of a tensor."""

    tensor: PlannedTensor
    index: int
    pieces: list[tuple[int, int]]

    @property
    def start(self) -> int:
        return self.pieces[0][0]

    @property
    def count(self) -> int:
        return sum(count for _, count in self.pieces)


class _Run:
    """One job on its way through its passes."""

    def __init__(self, job: Job, plan: MergePlan, block_elements: int) -> None:
        self.job = job
        self._blocks: list[_Place] = []
        for spec in job.tensors:
            for piece in plan.blocks(spec, block_elements):
                self._blocks.append(_Place(plan.tensors[spec.name], len(self._blocks), [piece]))
        self._places = self._blocks
        self._has_base = plan.has_base
        self._steps = plan.method.passes(job)
        self._step: Pass | Sample | None = None
        self._checked = False
        self.merge: Merge | None = None
        self._results: list[Any] = []
        self._left = 0

    def advance(self) -> list[list[_Place]]:
        """Begins the next pass; returns its tasks."""
        try:
            if self._step is None:
                self._step = next(self._steps)
            else:
                self._checked = self._checked or not isinstance(self._step, Sample)
                self._step = self._steps.send(self._results)
        except StopIteration as end:
            self._step, self.merge = None, end.value
        self._places = self._blocks
        if isinstance(self._step, Sample):
            (tensor,) = {place.tensor.spec.name: place.tensor for place in self._blocks}.values()
            pieces = self._step.pieces
            groups = [pieces[at : at + SAMPLE_PIECES] for at in range(0, len(pieces), SAMPLE_PIECES)]
            self._places = [_Place(tensor, index, group) for index, group in enumerate(groups)]
        self._results = [None] * len(self._places)
        tasks: list[list[_Place]] = []
        room = 0
        for place in self._places:
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
        parts = [load_block(tensor.sources, *piece, tensor.computed_in, self._has_base) for piece in place.pieces]
        values = parts[0] if len(parts) == 1 else [torch.cat(of_source) for of_source in zip(*parts, strict=True)]
        if not (self._checked or isinstance(self._step, Sample)):
            check_finite(tensor.sources, values, place.start)
        base, models = (values[0], values[1:]) if self._has_base else (None, values)
        block = Block(tensor.spec, place.index, place.start, base, models, tensor.computed_in)
        if isinstance(self._step, Sample):
            return self._step.measure(block)
        if self.merge is None:
            assert self._step is not None
            return self._step(block)
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
    keep_freed_memory(KEPT_BYTES)
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
