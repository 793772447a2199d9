"""`fusemega train --dry-run`: what a run would do, from configurations and data, without weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from fusemega.checkpoint.open_model import ModelSource
from fusemega.checkpoint.read_plan import NOTHING_DONE, table
from fusemega.checkpoint.series import CHECKPOINTS, latest_checkpoint, read_state
from fusemega.runtime.kernel_packages import transformer_engine_problem
from fusemega.runtime.parallel import environment_rank
from fusemega.runtime.precision import Precision
from fusemega.text.data import Source
from fusemega.text.dataset import TokenizedDataset
from fusemega.training.assembly import Checked, check_output, profile_of
from fusemega.training.export import check_export
from fusemega.training.identity import check_identity, read_content, run_identity
from fusemega.training.run_file import TrainRun


@dataclass(frozen=True)
class Examined:
    """A run that was opened and checked, its rows too.

    Attributes:
        checked: what it names.
        dataset: the training data.
        start: updates that are done, in the newest checkpoint.
        iterations: updates in all.
        lines: name -> what it would do, in words.
    """

    checked: Checked
    dataset: TokenizedDataset
    start: int
    iterations: int
    lines: dict[str, str]


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
    examined = examine(run, world_size)
    summary = "\n".join(f"{name:<10} {value}" for name, value in examined.lines.items())
    # With expert parallelism, some data-parallel ranks hold one copy of the model together.
    parallel, checked = run.parallel, examined.checked
    copies = parallel.data_parallel_size(world_size) * parallel.replica_size // parallel.model_parallel_size
    reads = "\n\n".join(
        f"weights of {source.config.load}, read by each of {copies} data-parallel replica(s):\n"
        f"{table(source.plan_reads())}"
        for source in (checked.source, *checked.frozen.values())
    )
    return f"{summary}\n\n{reads}\n{NOTHING_DONE} but the cache of tokenized data"


def examine(run: TrainRun, world_size: int, elsewhere: bool = False) -> Examined:
    """Opens and checks everything a run names, its rows and its checkpoints too. Arguments and errors as `describe`.

    Args:
        elsewhere: the run will be on other machines, so that a precision that this one lacks is not refused.
    """
    opened = _without_fp8(run) if elsewhere and transformer_engine_problem() is not None else run
    checked = Checked.of(opened, world_size)
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
    iterations = training.iterations(dataset.num_units)
    length = f"{iterations} iterations"
    length += "" if training.train_iters else f" ({training.train_epochs:g} epochs)"
    done = 0
    if (newest := latest_checkpoint(Path(run.output_dir) / CHECKPOINTS)) is not None:
        saved = read_state(newest)
        done = saved.pop("iteration")
        content = read_content(checked.source, checked.objective, dataset, held_out)
        consumed = saved.get("consumed_samples", 0)
        check_identity(newest, saved, run_identity(run, content, consumed, iterations))
    start = f"resumes after iteration {done}" if newest else "starts from the loaded weights"
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
    if opened is not run:
        asked = {"fp8": run.model.fp8, "transformer_impl": run.model.transformer_impl}
        lines["model"] += f" here; {', '.join(f'{key} {value}' for key, value in asked.items() if value)} there"
    return Examined(checked, dataset, done, iterations, lines)


def _without_fp8(run: TrainRun) -> TrainRun:
    """The same run without what only the machines of the job may have; the run itself where it asks for none of it."""
    if run.model.fp8 is None and run.model.transformer_impl != "transformer_engine":
        return run
    precision = {name: None for name in Precision.model_fields if name.startswith("fp8")}
    model = run.model.model_copy(update={**precision, "transformer_impl": "auto"})
    return run.model_copy(update={"model": model})


def _in_words(source: ModelSource) -> str:
    hf_config, load, dtype = source.hf_config, source.config.load, source.config.dtype
    parameters = sum(math.prod(shape) for shape in source.architecture.hf_shapes().values())
    return f"{load}: {hf_config['model_type']}, {parameters / 1e6:.1f}M parameters, {dtype}, {source.kernels}"
