"""`fusemega train`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from fusemega.cli.run_options import NPROC, OVERRIDES, RUN_FILE, launch_or_continue
from fusemega.runtime.console import tell
from fusemega.runtime.meeting import stopped_status


def command(
    run_file: RUN_FILE,
    overrides: OVERRIDES = None,
    nproc: NPROC = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything the run names, print what it would do, and stop.")
    ] = False,
) -> None:
    """Train a model with the settings of RUN_FILE. Run the same command again to resume after an interruption.

    Everything is written below the run's output_dir: metrics.jsonl, tensorboard/, checkpoints/ and, at the end, hf/,
    a folder that transformers loads. The same file runs under torchrun and srun, where --nproc is left out.
    """
    from fusemega.config import load
    from fusemega.training.run_file import TrainRun

    run = load(TrainRun, run_file, overrides or [])
    if dry_run:
        from fusemega.training.dry_run import describe

        tell(describe(run, nproc))
    elif not launch_or_continue(nproc, run.parallel):
        from fusemega.training.assembly import train

        if number := train(run):
            sys.exit(stopped_status(number))
