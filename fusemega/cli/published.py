"""`fusemega published`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    name: Annotated[str, typer.Argument(metavar="SET", help="fusechat3-sft or fusechat3-dpo.", show_default=False)],
    data: Annotated[
        str,
        typer.Argument(
            help="File, folder or glob of its rows, or the hub id: FuseAI/FuseChat-3.0-SFT-Data or -DPO-Data.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Argument(help="JSONL file to write.", show_default=False)],
    allow_other_counts: Annotated[
        bool, typer.Option("--allow-other-counts", help="Go on where the counts are not the published ones.")
    ] = False,
) -> None:
    """Convert a published training set to rows that `train` reads, and compare its counts with the published table.

    The sets are FuseAI's of FuseChat-3.0: 94,539 conversations for SFT, and 64,128 pairs for DPO. Every data set in
    them is counted. OUT appears complete or not at all. Prints one JSON object.
    """
    from fusemega.selection.published import convert_published

    print(json.dumps(convert_published(name, data, out, allow_other_counts)))
