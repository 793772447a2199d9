"""`fusemega train --dry-run`: what a run would do, from configurations and data, without weights."""

from __future__ import annotations

import math
from pathlib import Path

from fusemega.checkpoint.open_model import ModelSource
from fusemega.checkpoint.read_plan import NOTHING_DONE, table
from fusemega.checkpoint.series import CHECKPOINTS, latest_checkpoint, read_state
from fusemega.runtime.parallel import environment_rank
from fusemega.text.data import Source
from fusemega.training.assembly import Checked, check_output, profile_of
from fusemega.training.export import check_export
from fusemega.training.run_file import TrainRun


def describe(run: TrainRun, nproc: int | None) -> str:
    """Open and check everything `run` names, its rows too, and say in a few lines what would happen.

    Nothing is allocated, and nothing written but tokenized data, where the run will look for it.

    Args:
        run: the run file.
        nproc: processes that would take part; None: as many as the launcher says.

    Raises:
        UserError: whatever `train` would refuse before it starts.
    """
    world_size = nproc or environment_rank()[1]
    checked = Checked.of(run, world_size)
    check_output(Path(run.output_dir))
    if run.training.export_hf:
        check_export(Path(run.output_dir))
    dataset = checked.prepared(run.data)
    checked.check_data(dataset)
    if (profiled := profile_of(run, dataset.num_units)) is not None:
        profiled.check()
    held_out = None if run.evaluation is None else checked.prepared(run.evaluation.data)
    if held_out is not None:
        checked.held_out(held_out)
    parallel = run.parallel
    dp = parallel.data_parallel_size(world_size)
    files = Source(run.data).names
    named = f"{len(files)} file(s): {', '.join(files[:3])}{', ...' if len(files) > 3 else ''}"
    training = run.training
    length = f"{training.iterations(dataset.num_units)} iterations"
    length += "" if training.train_iters else f" ({training.train_epochs:g} epochs)"
    newest = latest_checkpoint(Path(run.output_dir) / CHECKPOINTS)
    start = f"resumes after iteration {read_state(newest)['iteration']}" if newest else "starts from the loaded weights"
    units = "groups" if dataset.is_grouped else "samples"
    lines = {
        "model": _in_words(checked.source),
        **{name: _in_words(source) for name, source in checked.frozen.items()},
        "layout": f"{world_size} process(es): {parallel} x DP {dp}",
        "data": f"{named}; {dataset.in_words()}",
        **({} if held_out is None else {"held out": held_out.in_words()}),
        "rows": f"{run.data.seq_length} tokens, {'packed' if training.packing else 'one sample each'}, "
        f"{training.micro_batch_size} a forward pass, {training.global_batch_size} {units} an update",
        "objective": ", ".join(f"{key}={value}" for key, value in run.objective.model_dump().items()),
        "length": f"{length}; {start}",
        "output": run.output_dir,
    }
    summary = "\n".join(f"{name:<10} {value}" for name, value in lines.items())
    # With expert parallelism, some data-parallel ranks hold one copy of the model together.
    copies = dp * parallel.replica_size // parallel.model_parallel_size
    reads = "\n\n".join(
        f"weights of {source.config.load}, read by each of {copies} data-parallel replica(s):\n"
        f"{table(source.plan_reads())}"
        for source in (checked.source, *checked.frozen.values())
    )
    return f"{summary}\n\n{reads}\n{NOTHING_DONE} but the cache of tokenized data"


def _in_words(source: ModelSource) -> str:
    hf_config, load, dtype = source.hf_config, source.config.load, source.config.dtype
    parameters = sum(math.prod(shape) for shape in source.architecture.hf_shapes().values())
    return f"{load}: {hf_config['model_type']}, {parameters / 1e6:.1f}M parameters, {dtype}, {source.kernels}"
