"""Describes what a merge would do, as text, and shows the progress of one that runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import Progress as Bar

from fusemega.merge.plan import MergePlan, memory_bytes
from fusemega.runtime.console import console, say
from fusemega.runtime.workers import default_workers

if TYPE_CHECKING:
    from fusemega.merge.execute import Progress
    from fusemega.merge.merge import Options

LINE_SECONDS = 30
"""How often progress is reported without a terminal."""


def describe(plan: MergePlan, options: Options) -> str:
    """The plan as text: every tensor, then the totals."""
    workers = min(options.workers or default_workers(), len(plan.jobs))
    block = plan.block_elements(options.block_elements)
    lines = [f"merge by {plan.method.name} of {len(plan.models)} model(s)"]
    lines += [f"  {'base ' if plan.has_base and not i else 'model'}  {f.path}" for i, f in enumerate(plan.folders)]
    read = 0
    for job in plan.jobs:
        measures = plan.method.measures(job.settings)
        for spec in job.tensors:
            tensor = plan.tensors[spec.name]
            size = sum(source.dtype.itemsize for source in tensor.sources) * spec.elements
            read += size * (len(measures) + 1)
            shape = " x ".join(map(str, spec.shape))
            count = len(plan.blocks(spec, block))
            lines.append(
                f"  {spec.name}  [{shape}] {str(tensor.dtype).removeprefix('torch.')}: {len(tensor.sources)} sources, "
                f"{count} block(s), {len(measures) + 1} pass(es)"
            )
    passes = ", ".join([*plan.method.measures(plan.jobs[0].settings), "merge"])
    lines += [
        f"passes: {passes}",
        f"{workers} worker(s), blocks of up to {block} elements",
        f"reads {read / 1e9:.2f} GB, writes {plan.output_bytes / 1e9:.2f} GB in {len(plan.shards)} file(s)",
        f"expected peak memory: {memory_bytes(plan, workers, block) / 2**20:.0f} MiB",
    ]
    return "\n".join(lines)


@contextmanager
def progress_bar(plan: MergePlan) -> Iterator[Progress]:
    """A bar with the time left on a terminal, and a line every half minute elsewhere, both on stderr."""
    total = sum(tensor.spec.elements for tensor in plan.tensors.values())
    if sys.stderr.isatty():
        # Refreshed by hand: no refresh thread may exist when processes are forked.
        with Bar(console=console(), auto_refresh=False) as bar:
            task = bar.add_task(f"merging by {plan.method.name}", total=total)

            def show(count: int) -> None:
                bar.advance(task, count)
                bar.refresh()

            yield show
        return
    done: list[int] = []  # the first is what an interrupted merge had written
    begun = said = time.monotonic()

    def line(count: int) -> None:
        nonlocal said
        done.append(count)
        now = time.monotonic()
        if now - said > LINE_SECONDS:
            left = (total - sum(done)) * (now - begun) / max(sum(done[1:]), 1)
            say(f"merged {sum(done) / total:.0%}, about {left:.0f} s left")
            said = now

    yield line
