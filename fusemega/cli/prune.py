"""`fusemega prune`: blocks removed from a trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Pruning: attention and MLP blocks removed from a trained model.")


@app.callback()
def _group() -> None:
    """Keeps the names of commands, also where there is one."""


@app.command("apply")
def apply(
    source: Annotated[str, typer.Argument(help="Hugging Face folder or hub id of the whole model.")],
    order: Annotated[Path, typer.Argument(help="Order of removed blocks, of our form or of BlockPruner's authors.")],
    out: Annotated[Path, typer.Argument(help="Folder to write: a Hugging Face folder.")],
    blocks: Annotated[
        int | None,
        typer.Option(min=1, help="How many blocks to remove.", show_default="all of the order"),
    ] = None,
    export: Annotated[
        str | None,
        typer.Option(
            help="Form of the folder. plain: an ordinary model of fewer layers; the blocks that are left must take"
            " turns. nemotron-nas: block_configs, which vLLM, TensorRT-LLM and llama.cpp read; not for every family."
            " remote-code: for transformers with trust_remote_code; every family.",
            show_default="plain",
        ),
    ] = None,
) -> None:
    """Write a model without the first blocks of an order. Weights are kept bit for bit; one tensor is in memory.

    A layer of which both blocks are removed disappears, and the others are renumbered. Prints one JSON object, which is
    also OUT/pruning.json: what was removed, the layers that each layer's blocks come from, parameters and bytes.
    """
    from fusemega.prune.apply import apply_order
    from fusemega.runtime.console import say
    from fusemega.runtime.parallel import ParallelConfig, initialize

    record = apply_order(source, order, out, initialize(ParallelConfig()), blocks=blocks, export=export)
    for note in record["notes"]:
        say(note)
    before, after = record["parameters"]["before"], record["parameters"]["after"]
    say(f"{len(record['removed'])} blocks removed: {before:,} parameters before, {after:,} after")
    print(json.dumps(record))
