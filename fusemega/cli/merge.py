"""`fusemega merge`."""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from fusemega.cli.many_values import ManyValues, is_override
from fusemega.errors import UserError

parser = ManyValues


def command(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="[RUN_FILE] OUT [KEY=VALUE]...",
            help="YAML run file (mergekit's format), left out if --method is given; the folder to write; and "
            "values of the run file to replace or add, such as parameters.density=0.6.",
            show_default=False,
        ),
    ],
    method: Annotated[str | None, typer.Option(help="The method, such as sce; replaces the run file.")] = None,
    base: Annotated[str | None, typer.Option(help="The model that deltas are computed against.")] = None,
    models: Annotated[list[str] | None, typer.Option(metavar="A B ...", help="The models to merge.")] = None,
    weights: Annotated[
        list[float] | None, typer.Option(metavar="W W ...", help="Weights of the models, one for each.")
    ] = None,
    vocabulary: Annotated[
        str | None,
        typer.Option(
            help="What to do if vocabularies differ: crop (to the base's), pad (to the longest), position, or "
            "union (by token string)."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check everything, print the plan with its memory and bytes to read and write, and stop."
        ),
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Resume an interrupted merge to the same OUT.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Number of processes; default: one for each core, at most 8.")
    ] = None,
    block_elements: Annotated[
        int | None, typer.Option(min=1, help="Elements of a tensor that a process works on at a time.")
    ] = None,
) -> None:
    """Merge fine-tuned variants of one model, tensor by tensor and block by block, into OUT, a Hugging Face folder.

        fusemega merge merge.yaml OUT

        fusemega merge OUT --method sce --base B --models A B C parameters.select_topk=0.1

    Memory hardly depends on the size and number of the models (--dry-run prints it). OUT appears complete or not at
    all, with merge_report.json and merge_report.html beside the weights. Prints one JSON object.
    """
    gc.disable()  # importing torch makes objects by the hundred thousand, and no garbage
    from fusemega.files.output import refuse_existing
    from fusemega.merge.dry_run import describe, progress_bar
    from fusemega.merge.merge import Options, merge, opened
    from fusemega.report.merge_page import merge_page
    from fusemega.runtime.console import say, tell

    gc.enable()
    overrides = [argument for argument in arguments if is_override(argument)]
    paths = [argument for argument in arguments if not is_override(argument)]
    if len(paths) != (2 if method is None else 1):
        wanted = "a run file and OUT" if method is None else "OUT alone, since --method stands for the run file"
        raise UserError(f"fusemega merge: found {' '.join(paths) or 'nothing'}; expected {wanted}")
    run, notes, source = _run(paths, overrides, method, base, models, weights, vocabulary)
    out = Path(paths[-1])
    refuse_existing(out)
    begun = time.monotonic()
    with opened(run, out, source, notes) as plan:
        for note in plan.notes:
            say(note)
        options = Options(workers, block_elements, resume)
        if dry_run:
            tell(describe(plan, options))
            return
        with progress_bar(plan) as progress:
            merge(plan, out, options, progress=progress, page=merge_page)
        seconds = time.monotonic() - begun
        print(json.dumps({"wrote": str(out), "bytes": plan.output_bytes, "seconds": round(seconds, 3)}))


def _run(
    paths: list[str],
    overrides: list[str],
    method: str | None,
    base: str | None,
    models: list[str] | None,
    weights: list[float] | None,
    vocabulary: str | None,
) -> tuple[Any, list[str], str]:
    """The run, notes on how it was read, and what to call it in messages."""
    from fusemega.config import apply_overrides, read_yaml, validate
    from fusemega.merge.run_file import MergeRun, from_mergekit

    source = paths[0] if method is None else "command line"
    if method is None:
        if base or models or weights:
            raise UserError(f"--base, --models and --weights go with --method; {source} names its own")
        data = read_yaml(source, overrides)
    else:
        if weights and len(weights) != len(models or []):
            raise UserError(f"--weights: found {len(weights)} for {len(models or [])} models")
        parameters: list[dict[str, Any]] = [{"weight": weight} for weight in weights or []] or [{}] * len(models or [])
        entries = [{"model": m, "parameters": p} for m, p in zip(models or [], parameters, strict=True)]
        data = {"merge_method": method, "models": entries} | ({"base_model": base} if base else {})
        data = apply_overrides(data, overrides, source)
    if vocabulary is not None:
        data["vocabulary"] = vocabulary
    data, notes = from_mergekit(data, source)
    return validate(MergeRun, data, source), notes, source
