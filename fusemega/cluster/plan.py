"""The plan of a training job: who computes what, how many jobs of this length it takes, how much a lost job loses."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from pathlib import Path

from fusemega.cluster.request import JobRequest
from fusemega.cluster.slurm import clock
from fusemega.errors import UserError
from fusemega.inspect.layout import first_share, place_of
from fusemega.training.dry_run import Examined, examine
from fusemega.training.records import DONE_MARKER, METRICS_FILE, TIME, read_metrics
from fusemega.training.run_file import TrainRun

_LOOKED = 32
"""Data-parallel ranks whose share of the first update is looked at."""
_ROWS = 50
"""The newest rows of metrics that say how long an iteration takes."""


def training_plan(run: TrainRun, request: JobRequest) -> tuple[dict[str, str], bool]:
    """Opens and checks all that a run names, and says what the jobs will do.

    Nothing is written but the cache of tokenized data, where the run will look for it.

    Returns:
        Name -> line for the terminal; and whether something is left to do.

    Raises:
        UserError: whatever `train` would refuse before it starts; a layout that does not divide the processes; the
            checkpoints of another run in output_dir.
    """
    lines = {"processes": processes(request)}
    try:
        dp = run.parallel.data_parallel_size(request.world_size)
    except UserError as error:
        raise UserError(f"--nodes {request.nodes} --gpus-per-node {request.gpus_per_node}: {error}") from None
    examined = examine(run, request.world_size, elsewhere=True)
    lines |= examined.lines
    lines["batch"] = _batch(run, request, examined, dp)
    output = Path(run.output_dir)
    left = examined.iterations - examined.start
    lines |= _time(run, request, left)
    if request.gpus_per_node % (tensor := run.parallel.tensor_model_parallel_size) and request.nodes > 1:
        lines["note"] = f"tensor parallelism over {tensor} ranks crosses nodes of {request.gpus_per_node}: slow"
    return lines, left > 0 or not (output / DONE_MARKER).exists()


def processes(request: JobRequest) -> str:
    """The world in words.

    >>> processes(JobRequest(nodes=2))
    '2 nodes x 8 GPUs = 16'
    """
    nodes = f"{request.nodes} node{'s' if request.nodes > 1 else ''}"
    gpus = f"{request.gpus_per_node} GPU{'s' if request.gpus_per_node > 1 else ''}"
    return f"{nodes} x {gpus} = {request.world_size}"


def _batch(run: TrainRun, request: JobRequest, examined: Examined, dp: int) -> str:
    """What data-parallel ranks get in the first update: how many of them get how much."""
    layout, source = run.parallel, examined.checked.source
    each = layout.tensor_model_parallel_size * layout.context_parallel_size  # ranks of one data-parallel rank, here
    looked = min(dp, _LOOKED)
    places = [place_of(layout, request.world_size, rank * each, whole_rows=True) for rank in range(looked)]
    shares = Counter(first_share(run, examined.dataset, source, place) for place in places)
    of = f"the first {looked} of {dp}" if looked < dp else str(dp)
    words = [f"{count} with {share}" for share, count in shares.items()]
    return f"in the first update, of {of} data-parallel rank(s): {'; '.join(words)}"


def _time(run: TrainRun, request: JobRequest, left: int) -> dict[str, str]:
    """How long it takes, and how often it is saved, as far as that is known."""
    interval, output = run.training.save_interval, Path(run.output_dir)
    every = "at the end" if interval is None else f"every {interval} iterations and at the end"
    saves = f"{every}; and when a job's time limit is near, or it is preempted"
    seconds = [row[TIME] for row in read_metrics(output)[-_ROWS:] if TIME in row]
    if not seconds:
        unknown = f"the time of an iteration is unknown: no {output / METRICS_FILE} of an earlier job"
        return {"checkpoints": saves, "time": f"{clock(request.seconds)} a job; {unknown}"}
    each = statistics.median(seconds)
    known = f"{each:.3g} s an iteration (median of the last {len(seconds)} in {output / METRICS_FILE})"
    total = left * each
    jobs = math.ceil(total / request.seconds) if total else 0
    time = f"{clock(request.seconds)} a job; {known}; {left} left: {clock(total)}, {jobs} job(s) of this length"
    if interval is None:
        saves += "; a node that fails costs all since then: set training.save_interval" if total > 3600 else ""
    else:
        saves += f"; {clock(interval * each)} apart"
        if interval * each > request.seconds:
            most = max(1, int(request.seconds / each))
            saves += f", longer than a job: a node that fails costs all of its time; {most} iterations fit into a job"
    return {"checkpoints": saves, "time": time}
