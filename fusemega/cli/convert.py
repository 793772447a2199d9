"""`fusemega convert`: between Hugging Face folders and Megatron folders, bit for bit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fusemega.cli.run_options import NPROC, launch_or_continue
from fusemega.errors import UserError, choose
from fusemega.files.opening import read_text
from fusemega.files.sizes import parse_size
from fusemega.runtime.console import global_rank, say, tell

if TYPE_CHECKING:
    from fusemega.convert.convert import Report
    from fusemega.runtime.layout import ParallelConfig

app = typer.Typer(no_args_is_help=True, help="Convert checkpoints: Hugging Face <-> Megatron, bit for bit.")

_DTYPES = ("float32", "bfloat16", "float16")

WORKERS = Annotated[
    int | None,
    typer.Option(
        min=1, help="Number of processes that copy, on this machine.", show_default="one for each core, at most 8"
    ),
]
RESUME = Annotated[bool, typer.Option("--resume", help="Resume an interrupted call from .OUT.incomplete.")]
DRY_RUN = Annotated[
    bool,
    typer.Option("--dry-run", help="Check everything, print what each rank of a run would read from SOURCE, and stop."),
]
DRY_TP = Annotated[
    int, typer.Option("--tensor-model-parallel-size", min=1, help="With --dry-run: the layout to plan for.")
]
DRY_PP = Annotated[
    int, typer.Option("--pipeline-model-parallel-size", min=1, help="With --dry-run: the layout to plan for.")
]
DRY_EP = Annotated[
    int, typer.Option("--expert-model-parallel-size", min=1, help="With --dry-run: the layout to plan for.")
]


@app.command("import")
def import_(
    source: str,
    out: Path,
    workers: WORKERS = None,
    resume: RESUME = False,
    dry_run: DRY_RUN = False,
    tp: DRY_TP = 1,
    pp: DRY_PP = 1,
    ep: DRY_EP = 1,
) -> None:
    """Convert SOURCE (a Hugging Face folder or hub id) to OUT (a Megatron folder, which loads in any layout).

    Memory does not grow with the model: each process holds a few blocks of 1 MB.
    """
    from fusemega.convert.convert import import_hf
    from fusemega.hf.hub import resolve
    from fusemega.runtime.workers import default_workers

    if dry_run:
        from fusemega.checkpoint.read_plan import describe_import

        tell(describe_import(resolve(source), out, _layout(tp, pp, ep)))
        return
    _check_no_layout(tp, pp, ep)
    _once(out, lambda: import_hf(resolve(source), out, workers=workers or default_workers(), resume=resume))


@app.command("export")
def export(
    source: Path,
    out: Path,
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of the written weights; default: that of the folder that the run loaded.")
    ] = None,
    iteration: Annotated[
        int | None, typer.Option(min=0, help="Which checkpoint of a run's folder; default: the newest.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest size of a weight file, such as 500MB.")] = "5GB",
    workers: WORKERS = None,
    resume: RESUME = False,
    dry_run: DRY_RUN = False,
    tp: DRY_TP = 1,
    pp: DRY_PP = 1,
    ep: DRY_EP = 1,
) -> None:
    """Convert SOURCE (a Megatron folder, a run, or a checkpoint) to OUT (a Hugging Face folder for transformers).

    From a run's checkpoint, the optimizer's fp32 main parameters are written, in --dtype.
    """
    chosen = None if dtype is None else choose("--dtype", dtype, _DTYPES)
    size = parse_size("--max-shard-size", max_shard_size)
    import torch

    from fusemega.convert.convert import export_megatron
    from fusemega.runtime.workers import default_workers

    torch_dtype = None if chosen is None else getattr(torch, chosen)
    if dry_run:
        from fusemega.checkpoint.read_plan import describe_export

        layout = _layout(tp, pp, ep)
        tell(describe_export(source, out, layout, dtype=torch_dtype, max_shard_size=size, iteration=iteration))
        return
    _check_no_layout(tp, pp, ep)
    _once(
        out,
        lambda: export_megatron(
            source,
            out,
            dtype=torch_dtype,
            max_shard_size=size,
            workers=workers or default_workers(),
            resume=resume,
            iteration=iteration,
        ),
    )


@app.command("merge-adapter")
def merge_adapter(
    base: str,
    adapter: str,
    out: Path,
    dtype: Annotated[str | None, typer.Option(help="Dtype of the written weights; default: the base's.")] = None,
) -> None:
    """Add ADAPTER (a LoRA adapter in peft's format: a folder or hub id) to BASE, and write OUT (Hugging Face).

    Sums are computed in fp32 and rounded once. Prints one JSON object.
    """
    chosen = None if dtype is None else choose("--dtype", dtype, _DTYPES)
    import torch

    from fusemega.hf.adapter import merge_adapter
    from fusemega.hf.hub import resolve

    if global_rank() == 0:
        torch_dtype = None if chosen is None else getattr(torch, chosen)
        done = merge_adapter(resolve(base), resolve(adapter), out, torch_dtype)
        for note in done.pop("notes"):
            say(note)
        typer.echo(json.dumps({"wrote": str(out)} | done))


@app.command("verify")
def verify(
    hf: str,
    other: Path,
    text: Annotated[
        str | None,
        typer.Option(help="A text, or a file with a text: also compare the logits on its first 512 tokens, in fp32."),
    ] = None,
    workers: WORKERS = None,
    tp: Annotated[
        int, typer.Option("--tensor-model-parallel-size", min=1, help="With --text: tensor-parallel ranks.")
    ] = 1,
    pp: Annotated[int, typer.Option("--pipeline-model-parallel-size", min=1, help="With --text: pipeline stages.")] = 1,
    nproc: NPROC = None,
) -> None:
    """Compare HF (a folder or hub id) with OTHER (a Hugging Face or Megatron folder).

    Compares every bit of every tensor, and the files of a Megatron folder with its integrity manifest, in little
    memory. With --text both models are loaded completely; a Megatron folder is loaded by --nproc processes if a layout
    is given. Prints one JSON object; exit status 1 if they differ.
    """
    if text is None and (nproc, tp, pp) != (None, 1, 1):
        raise UserError("convert verify: --nproc and the layout need --text; files are compared by --workers processes")
    # The number of ranks under torchrun, or under srun.
    launched = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1)
    if text is not None and nproc is None and tp * pp > 1 and launched == 1:
        raise UserError(f"this layout needs {tp * pp} processes; give --nproc {tp * pp}")
    if launch_or_continue(nproc, _layout(tp, pp)):
        return
    from fusemega.convert import verify as verification
    from fusemega.hf.hub import resolve
    from fusemega.runtime.workers import default_workers

    folder = resolve(hf)
    difference = None
    if text is not None:
        from fusemega.runtime.parallel import initialize, shutdown

        world = initialize(_layout(tp, pp))
        try:
            difference = verification.logit_difference(folder, other, world, _read_text(text))
        finally:
            shutdown()
    if global_rank() != 0:
        return
    result = verification.verify(folder, other, workers=workers or default_workers())
    typer.echo(json.dumps(result.as_dict() | {"max_logit_difference": difference}))
    if not result.identical:
        raise typer.Exit(1)


def _layout(tp: int, pp: int, ep: int = 1) -> ParallelConfig:
    from fusemega.runtime.layout import ParallelConfig

    return ParallelConfig(
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1,  # which models with experts need, and which changes nothing else here
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
    )


def _check_no_layout(tp: int, pp: int, ep: int) -> None:
    if (tp, pp, ep) != (1, 1, 1):
        raise UserError(
            "--tensor-model-parallel-size, --pipeline-model-parallel-size and --expert-model-parallel-size need "
            "--dry-run: a conversion writes the same files for every layout; --workers sets the number of processes"
        )


def _once(out: Path, conversion: Callable[[], Report]) -> None:
    """Runs a conversion on rank 0 alone: it starts its own processes, so the other ranks have nothing to do."""
    if global_rank() == 0:
        tell(f"wrote {out}: {conversion()}")


def _read_text(text: str) -> str:
    """The contents of a file, or the text itself where no file has that name."""
    try:
        path = Path(text)
        return read_text(path) if path.is_file() else text
    except OSError:  # longer than a file's name may be
        return text
