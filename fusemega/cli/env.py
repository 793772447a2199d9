"""`fusemega env`: the machine as this project sees it."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer


def command(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, for machines.")] = False,
) -> None:
    """Show what this machine has, what is missing, what that costs, and what would break.

    Exits with status 1 if something that is required is missing or broken.
    """
    from fusemega.runtime.environment import BROKEN, MISSING, examine

    items = examine()
    broken = [item.name for item in items if item.status == BROKEN]
    if as_json:
        report = {"ok": not broken, "broken": broken, "items": [dataclasses.asdict(item) for item in items]}
        typer.echo(json.dumps(report, indent=1))
    else:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("", "found", "what follows"):
            table.add_column(column, overflow="fold")
        colours = {BROKEN: "bold red", MISSING: "yellow"}
        for item in items:
            # As Text, since the brackets of "fusemega[gpu]" would be read as markup.
            table.add_row(Text(item.name), Text(item.found), Text(item.note), style=colours.get(item.status))
        console = Console(highlight=False)
        console.print(table)
        console.print(f"broken: {', '.join(broken)}" if broken else "nothing that is required is broken", markup=False)
    raise typer.Exit(1 if broken else 0)
