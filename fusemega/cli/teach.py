"""`fusemega teach`."""

from __future__ import annotations

from fusemega.cli.run_options import NPROC, OVERRIDES, RUN_FILE, launch_or_continue


def command(run_file: RUN_FILE, overrides: OVERRIDES = None, nproc: NPROC = None) -> None:
    """Store a teacher's top-k log-probabilities and the log of the remaining mass, for every supervised token.

    Whole shards of rows are written: run the same command again to resume after an interruption. The store can be read
    under any layout, micro-batch size and order.
    """
    from fusemega.config import load
    from fusemega.scoring.teach import TeachRun, teach

    run = load(TeachRun, run_file, overrides or [])
    if not launch_or_continue(nproc, run.parallel):
        teach(run)
