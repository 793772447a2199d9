"""`fusemega prune`: blocks removed from a trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fusemega.cli.run_options import NPROC, OVERRIDES, RUN_FILE, launch_or_continue

app = typer.Typer(no_args_is_help=True, help="Pruning: attention and MLP blocks removed from a trained model.")


@app.command("search")
def search(run_file: RUN_FILE, overrides: OVERRIDES = None, nproc: NPROC = None) -> None:
    """Find which attention and MLP blocks of a model to remove, and in which order, by BlockPruner's search.

    In each round every block that is left is masked in turn, and the one without which the perplexity on the
    calibration data is lowest is removed. Writes the folder `output` with order.json, authors.json (the form of the
    method's authors), rounds.jsonl (what each round measured) and report.html, and prints one JSON object. Run the same
    command again to resume after an interruption, with the same result.
    """
    from fusemega.config import load
    from fusemega.prune.run_file import PruneRun
    from fusemega.prune.search import search as find

    run = load(PruneRun, run_file, overrides or [])
    if not launch_or_continue(nproc, run.parallel):
        result, world = find(run)
        if world.is_main:
            print(result.model_dump_json())


@app.command("eval")
def evaluate(run_file: RUN_FILE, overrides: OVERRIDES = None, nproc: NPROC = None) -> None:
    """Measure a model's perplexity with the first k blocks of an order masked, for each k asked for.

    No model is written. Prints one JSON object, and writes it to the run file's `output` if that is set.
    """
    from fusemega.config import load
    from fusemega.files.output import write_output
    from fusemega.prune.evaluate import check_eval_output, evaluate_order
    from fusemega.prune.run_file import PruneEvalRun

    run = load(PruneEvalRun, run_file, overrides or [])
    if run.output is not None:
        check_eval_output(Path(run.output))
    if launch_or_continue(nproc, run.parallel):
        return
    result, world = evaluate_order(run)
    if world.is_main:
        if run.output is not None:
            write_output(Path(run.output), result.model_dump_json(indent=1) + "\n")
        print(result.model_dump_json())


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
