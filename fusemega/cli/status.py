"""`fusemega status`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fusemega.errors import UserError
from fusemega.runtime.console import tell


def command(
    folder: Annotated[
        Path | None,
        typer.Argument(
            help="Output folder of a run or a recipe; default: those of your jobs in the queue, else this folder.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a folder and line, for machines.")] = False,
) -> None:
    """How far a training run or a recipe is: jobs, last step and checkpoint, tokens a second, the time left.

    Says which job waits and for what, which rank or stage is stuck and where, and what was last warned of. Works
    without Slurm too, for a run on this machine, and for a run that has ended. Writes nothing.
    """
    from fusemega.cluster.slurm import has_slurm
    from fusemega.cluster.status import folders_in_queue, status_of
    from fusemega.cluster.status_lines import status_lines

    if folder is not None:
        folders = [folder]
    else:
        folders = folders_in_queue() if has_slurm() else []
        try:
            found = [status_of(one) for one in folders or [Path()]]
        except UserError as error:
            where = "no job of yours in the queue was submitted by fusemega launch, and " if has_slurm() else ""
            raise UserError(f"{where}{error}" if not folders else str(error)) from None
    if folder is not None:
        found = [status_of(folder)]
    for status in found:
        if as_json:
            tell(json.dumps(status.as_json()))
        else:
            for line in status_lines(status):
                tell(line)
