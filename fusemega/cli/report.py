"""`fusemega report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fusemega.runtime.console import tell


def command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Output folders of training runs.")],
    out: Annotated[Path, typer.Option(help="Folder to write; only an older report is replaced.")] = Path("report"),
) -> None:
    """Write one page about one or several training runs: curves, settings, throughput, memory, evaluations.

    Writes report.html, which needs no other file, and each curve as a PNG. The folder of a quickstart stands for all
    its runs. Results of `fusemega eval` are shown if their output is in a run's folder.
    """
    from fusemega.report.page import check_out, write_report
    from fusemega.report.runs import open_runs

    check_out(out, runs)
    tell(f"wrote {write_report(open_runs(runs), out)}")
