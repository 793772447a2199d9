"""`fusemega collect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    prompts: Annotated[str, typer.Argument(help="The prompts that were sampled.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="JSONL file to write.", show_default=False)],
    responses: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESPONSES...", help="Files of `fusemega sample`, one for each source.", show_default=False
        ),
    ],
    source: Annotated[list[str] | None, typer.Option(help="Take only this source; may be given several times.")] = None,
    keep_length: Annotated[
        bool, typer.Option("--keep-length", help="Keep responses that reached sampling.max_tokens and end there.")
    ] = False,
    incomplete: Annotated[
        bool, typer.Option("--incomplete", help="Take files in which responses are missing; they are counted.")
    ] = False,
    min_responses: Annotated[
        int, typer.Option(min=1, help="Leave out prompts with fewer responses; 2 is what `score` and training take.")
    ] = 2,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Of the prompts: use only this many rows, as prompts.limit did.")
    ] = None,
    unknown_fields: Annotated[str, typer.Option(help="Of the prompts: error, or ignore.")] = "error",
    on_bad_row: Annotated[str, typer.Option(help="Of the prompts: error, or skip.")] = "error",
) -> None:
    """Collect the responses of several sources as rows of a prompt and its responses.

    Dropped and counted: responses that did not end by themselves (finish_reason), empty ones, and of one source those
    with equal text. Prints one JSON object with all counts on stdout. The output appears complete or not at all.
    """
    from fusemega.config import validate
    from fusemega.sampling.collect import Rules, collect
    from fusemega.sampling.prompts import PromptsConfig

    given = {"path": prompts, "unknown_fields": unknown_fields, "on_bad_row": on_bad_row, "limit": limit}
    rules = Rules(keep_length, incomplete, min_responses, tuple(source or ()))
    print(collect(validate(PromptsConfig, given, "fusemega collect"), out, responses, rules).model_dump_json())
