"""`fusemega convert`: between Hugging Face folders and Megatron folders, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer

from fusemega.checkpoint import convert
from fusemega.checkpoint.hub import resolve
from fusemega.checkpoint.side_files import parse_size
from fusemega.errors import choose
from fusemega.runtime.parallel import ParallelConfig, World, initialize, shutdown

app = typer.Typer(no_args_is_help=True, help="Convert checkpoints: Hugging Face <-> Megatron, bit for bit.")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

TP = Annotated[int, typer.Option("--tensor-model-parallel-size", min=1, help="Ranks that share each layer.")]
PP = Annotated[int, typer.Option("--pipeline-model-parallel-size", min=1, help="Stages the layers are spread over.")]


@app.command("import")
def import_(source: str, out: Path, tp: TP = 1, pp: PP = 1) -> None:
    """SOURCE (a Hugging Face folder or hub id) to OUT (a Megatron folder). Any layout writes the same checkpoint."""
    with _world(tp, pp) as world:
        convert.import_hf(resolve(source), out, world)
        if world.is_main:
            typer.echo(f"wrote {out}")


@app.command("export")
def export(
    source: Path,
    out: Path,
    dtype: Annotated[str | None, typer.Option(help="Of the weights; by default what they were imported from.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, such as 500MB.")] = "5GB",
    tp: TP = 1,
    pp: PP = 1,
) -> None:
    """SOURCE (a Megatron folder) to OUT (a Hugging Face folder that transformers loads)."""
    chosen = None if dtype is None else _DTYPES[choose("--dtype", dtype, _DTYPES)]
    size = parse_size("--max-shard-size", max_shard_size)
    with _world(tp, pp) as world:
        convert.export_megatron(source, out, world, dtype=chosen, max_shard_size=size)
        if world.is_main:
            typer.echo(f"wrote {out}")


@app.command("verify")
def verify(
    hf: str,
    other: Path,
    text: Annotated[str | None, typer.Option(help="Compare the logits on this text too, in fp32.")] = None,
    tp: TP = 1,
    pp: PP = 1,
) -> None:
    """Compare HF (a Hugging Face folder or hub id) with OTHER (a Hugging Face or Megatron folder), tensor by tensor.

    Prints one JSON object; exit status 1 when they differ.
    """
    with _world(tp, pp) as world:
        result = convert.verify(resolve(hf), other, world, text)
        if world.is_main:
            typer.echo(json.dumps(result.as_dict()))
    if not result.identical:
        raise typer.Exit(1)


@contextmanager
def _world(tp: int, pp: int) -> Iterator[World]:
    world = initialize(ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp))
    try:
        yield world
    finally:
        shutdown()
