"""Executes a plan: each job block by block with its method, into files that are complete when the last job is done.

One process runs a job from its first pass to its last block, so the results of a job's passes are never sent to another
process. Processes are used, not threads: an operation on a block takes about ten microseconds, and threads that wait
for Python's lock after each of them lose more time than they gain. The processes are forked and share the memory of
Python and torch. Each computes in one thread (`torch.set_num_threads(1)`), so a result does not depend on how torch
would have split an operation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from fusemega.hf.narrowing import narrowed
from fusemega.hf.ranges import RangeWriter
from fusemega.hf.rounding import is_counted, steps
from fusemega.hf.safetensors_writer import raw_bytes
from fusemega.merge.journal import Done, Journal
from fusemega.merge.method import Block, Job, PartialPass
from fusemega.merge.plan import MergePlan, PlannedTensor
from fusemega.merge.rounding import shares
from fusemega.merge.sources import TensorSource, check_finite, load_block
from fusemega.runtime.console import say
from fusemega.runtime.memory import keep_freed_memory
from fusemega.runtime.workers import start_workers

JOURNAL_SECONDS = 1.0  # between two entries, each of which waits for the disk
SAMPLE_PIECES = 16  # parts that a partial pass puts into one block
KEPT_BYTES = 31 << 20  # more than any vector of a block
Progress = Callable[[int], None]
"""Called with the number of elements that have just been written."""


def execute(
    plan: MergePlan,
    writer: RangeWriter,
    journal: Journal,
    *,
    workers: int,
    block_elements: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Merges every job that is not in the journal, or whose weights differ from it. The largest come first, so that all
    processes end at about the same time.

    Returns:
        The report's rows, one for each tensor, in the plan's order.

    Raises:
        UserError: a source cannot be read or holds NaN or infinities.
    """
    jobs = {job.tensors[0].name: job for job in plan.jobs}
    done: dict[str, Done] = {}
    unsaved: list[tuple[str, Done]] = []
    keep_freed_memory(KEPT_BYTES)
    with _one_thread_each(), _to_do(_Work(plan, writer, block_elements, jobs)):
        with start_workers(min(workers, len(jobs)), forked=True) as pool:
            for name, found in pool.map(_hash_of, journal.done):
                if found == journal.done[name].hash:
                    done[name] = journal.done[name]
                else:
                    say(f"{journal.path}: {name} was changed after it was written; merging it again")
            progress(sum(jobs[name].elements for name in done))
            left = sorted((name for name in jobs if name not in done), key=lambda name: -jobs[name].elements)
            saved_at = time.monotonic()
            for name, merged in pool.map(_merged, left):
                progress(jobs[name].elements)
                done[name] = merged
                unsaved.append((name, merged))
                # The weights go to disk before the journal, whose lines say that they are there.
                if time.monotonic() - saved_at > JOURNAL_SECONDS:
                    writer.sync()
                    journal.add(unsaved)
                    unsaved, saved_at = [], time.monotonic()
    rows = {name: finished.tensors for name, finished in done.items()}
    by_tensor = {row["tensor"]: row for job_rows in rows.values() for row in job_rows}
    return [by_tensor[name] for name in plan.tensors]


@dataclass(frozen=True)
class _Place:
    """Where a block lies: in most passes, one piece of a tensor."""

    tensor: PlannedTensor
    index: int
    pieces: list[tuple[int, int]]


@dataclass(frozen=True)
class _Work:
    """What a process needs to merge any job of a plan."""

    plan: MergePlan
    writer: RangeWriter
    block_elements: int
    jobs: dict[str, Job]

    def merge(self, job: Job) -> Done:
        """All passes of one job."""
        steps = self.plan.method.passes(job)
        blocks = self._blocks(job)
        results: list[Any] | None = None
        checked = False
        near: dict[str, list[list[int] | None]] = {}
        try:
            while True:
                step = next(steps) if results is None else steps.send(results)
                if isinstance(step, PartialPass):
                    results = [step.measure(self._load(place)) for place in self._sampled(job, step)]
                else:
                    results = [step(self._load(place, None if checked else near)) for place in blocks]
                    checked = True
        except StopIteration as end:
            merge, results = end.value, None  # `merge` holds what it needs of the results
        agreed = 0.0
        written = xxhash.xxh3_128()
        for place in blocks:
            merged, agreeing = merge.apply(self._load(place, None if checked else near))
            agreed += agreeing
            written.update(raw_bytes(self._write(place, merged)))
        extra = {"sign_agreement": agreed / merge.pairs} if merge.pairs else {}
        said = dict(merge.report) | extra
        rows: list[dict[str, Any]] = [{"tensor": spec.name, "shape": list(spec.shape)} | said for spec in job.tensors]
        for row in rows:
            row |= shares(near.get(row["tensor"], []), math.prod(row["shape"]))
        return Done(rows, written.hexdigest())

    def _blocks(self, job: Job) -> list[_Place]:
        pieces = [(spec, piece) for spec in job.tensors for piece in self.plan.blocks(spec, self.block_elements)]
        return [_Place(self.plan.tensors[spec.name], index, [piece]) for index, (spec, piece) in enumerate(pieces)]

    def _sampled(self, job: Job, step: PartialPass) -> list[_Place]:
        (spec,) = job.tensors
        groups = [step.pieces[at : at + SAMPLE_PIECES] for at in range(0, len(step.pieces), SAMPLE_PIECES)]
        return [_Place(self.plan.tensors[spec.name], index, group) for index, group in enumerate(groups)]

    def _load(self, place: _Place, near: dict[str, list[list[int] | None]] | None = None) -> Block:
        """Reads a block. With `near`, its elements are checked, and those near the base's are counted there."""
        tensor, has_base = place.tensor, self.plan.has_base
        parts = [load_block(tensor.sources, *piece, tensor.computed_in, has_base) for piece in place.pieces]
        values = parts[0] if len(parts) == 1 else [torch.cat(of_source) for of_source in zip(*parts, strict=True)]
        start = place.pieces[0][0]
        if near is not None:
            check_finite(tensor.sources, values, start)
            if has_base:
                _add_steps(near.setdefault(tensor.spec.name, [None] * (len(values) - 1)), tensor.sources, values)
        base, models = (values[0], values[1:]) if has_base else (None, values)
        return Block(tensor.spec, place.index, start, base, models, tensor.computed_in)

    def _write(self, place: _Place, merged: torch.Tensor) -> torch.Tensor:
        """Writes a merged block; returns the values in the written dtype."""
        name, dtype = place.tensor.spec.name, place.tensor.dtype
        values = narrowed(merged, dtype, name)
        self.writer.write(name, place.pieces[0][0], values)
        return values

    def hash_of(self, job: Job) -> str:
        """XXH3-128 of the bytes that the job's tensors have in the output."""
        found = xxhash.xxh3_128()
        for spec in job.tensors:
            for block in self.writer.read(spec.name):
                found.update(block)
        return found.hexdigest()


def _add_steps(sums: list[list[int] | None], sources: Sequence[TensorSource], values: Sequence[torch.Tensor]) -> None:
    """Adds the counts of `steps` for each model for which they can be counted: not if some rows are not its own."""
    for number, (source, model) in enumerate(zip(sources[1:], values[1:], strict=True)):
        if is_counted(source.dtype) and source.rows is None and sources[0].rows is None:
            before, found = sums[number] or [0, 0], steps(values[0], model)
            sums[number] = [before[0] + found[0], before[1] + found[1]]


_work: _Work | None = None
"""The work of this process; processes forked from it find it here."""


@contextmanager
def _to_do(work: _Work) -> Iterator[None]:
    global _work
    _work = work
    try:
        yield
    finally:
        _work = None


def _merged(name: str) -> Done:
    assert _work is not None
    return _work.merge(_work.jobs[name])


def _hash_of(name: str) -> str:
    assert _work is not None
    return _work.hash_of(_work.jobs[name])


@contextmanager
def _one_thread_each() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
