"""`fusemega split`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fusemega.cli.many_values import ManyValues
from fusemega.errors import UserError, choose


class parser(ManyValues):  # noqa: N801  (the name that the command line looks for)
    lists = ("--tokenizers",)


def command(
    data: Annotated[str, typer.Argument(help="File, folder or glob of rows, as a run file's data.path.")],
    out: Annotated[Path, typer.Argument(help="JSONL file to write.")],
    tokenizers: Annotated[
        list[str],
        typer.Option(metavar="A B ...", help="Folders or hub ids: the target's tokenizer and every teacher's."),
    ],
    max_tokens: Annotated[
        int, typer.Option(min=2, help="Length of a window in tokens: the data.seq_length of the run files.")
    ] = 2048,
    on_long: Annotated[
        str,
        typer.Option(
            help="What to do with a single turn (or word) that is too long: error, or skip (leave it out and count it)."
        ),
    ] = "error",
) -> None:
    """Split long dialogues at turns, and texts at white space, so that every part fits every tokenizer's window.

    Each part of a dialogue keeps the system message and has an assistant turn; nothing else is repeated, and nothing
    is lost. Rows that fit are copied unchanged. OUT appears complete or not at all. Prints one JSON object.
    """
    import json

    from fusemega.files.output import new_file
    from fusemega.text.data import DataConfig, Source
    from fusemega.text.row_progress import row_progress
    from fusemega.text.split import Splitter
    from fusemega.text.tokenizer import Tokenizer

    mode: Literal["error", "skip"] = "skip" if choose("--on-long", on_long, ("error", "skip")) == "skip" else "error"
    source = Source(DataConfig(path=data))
    splitter = Splitter([Tokenizer.load(name) for name in tokenizers], max_tokens, mode)
    with new_file(out) as file, row_progress("splitting") as advance:
        for value in splitter(source, advance):
            try:
                file.write(json.dumps(value, ensure_ascii=False) + "\n")
            except TypeError as error:  # parquet has dates, for example
                raise UserError(f"{data}: a row cannot be written as JSON: {error}") from None
        if not splitter.counts["parts"]:
            raise UserError(f"{', '.join(source.names)}: no row is left to write")
    print(json.dumps({"wrote": str(out)} | splitter.counts))
