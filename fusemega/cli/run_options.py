"""What the commands that read a run file share: their arguments, and several processes from one command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fusemega.launch.local import launch_ranks, warm_up

if TYPE_CHECKING:
    from fusemega.runtime.parallel import ParallelConfig

RUN_FILE = Annotated[Path, typer.Argument(help="YAML run file; examples/ has commented ones.", show_default=False)]
OVERRIDES = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Replace a value of the run file, such as optimizer.lr=1e-5."),
]
NPROC = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Processes to start on this machine. Leave it out under torchrun or srun.",
        callback=lambda nproc: _begin_launch(nproc),
    ),
]


def launch_or_continue(nproc: int | None, parallel: ParallelConfig) -> bool:
    """True if `nproc` other processes have run the command to its end; False if this process has to do the work.

    Raises:
        UserError: the layout does not divide `nproc`, or what a rank raised.
    """
    if nproc is None or nproc == 1:
        return False
    parallel.data_parallel_size(nproc)
    argv = _without_nproc(sys.argv[1:])
    status = launch_ranks(argv, nproc)
    if status:
        sys.exit(status)
    return True


def _begin_launch(nproc: int | None) -> int | None:
    """Starts the ranks' imports, so that they run while this process imports what it needs to read the run file."""
    if nproc is not None and nproc > 1:
        warm_up()
    return nproc


def _without_nproc(argv: list[str]) -> list[str]:
    """The command's words for the ranks."""
    kept, skip = [], False
    for argument in argv:
        if skip:
            skip = False
        elif argument == "--nproc":
            skip = True
        elif not argument.startswith("--nproc="):
            kept.append(argument)
    return kept
