"""Several processes on this machine from one command: torchrun, with one error line instead of N tracebacks.

The ranks of such a launch are the same command again. They meet their parent, which outlives them all, in the folder
that `FUSEMEGA_LAUNCH` names: each leaves its process id there, and one that meets a UserError its line.

Importing torch, megatron-core and transformers takes a core several seconds. Without CUDA the ranks are therefore
forked from one fresh process that has imported them once (multiprocessing's fork server); with CUDA, which does not
survive a fork and comes with cores enough, each rank is a Python of its own.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from fusemega.errors import UserError

LAUNCH_FOLDER = "FUSEMEGA_LAUNCH"


def warm_up() -> None:
    """Begins, in the background, to import what ranks need. For a command that is about to launch some."""
    if _forks():
        multiprocessing.set_forkserver_preload(["fusemega.cli.preloaded"])
        forkserver.ensure_running()


def run_under_torchrun(argv: Sequence[str], nproc: int) -> int:
    """Runs `fusemega *argv` as `nproc` ranks on this machine and waits for them.

    The same as `python -m torch.distributed.run --standalone --nproc-per-node nproc -m fusemega *argv`, inside this
    process. TERM, INT, HUP and QUIT end the ranks (torchrun's rule: 30 s to go); USR1 is passed on to them.
    Where unset, OMP_NUM_THREADS becomes the cores' share of a rank.

    Returns:
        0; 1 where a rank failed (its traceback is on stderr); 128 + N where signal N ended the run.

    Raises:
        UserError: a rank raised one, or this process is itself a rank of a launcher.
    """
    if "WORLD_SIZE" in os.environ:
        raise UserError(
            f"--nproc {nproc}: this process is already rank {os.environ.get('RANK', '?')} of a launcher's "
            f"{os.environ['WORLD_SIZE']}; leave --nproc out under torchrun or srun"
        )
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # torchrun reports every failed rank at length; the rank has said it already.
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="forkserver",
    )
    with _meeting_folder() as folder:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
        # Hopper and earlier overlap tensor-parallel communication with compute only in a single hardware queue.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        entry: Callable[..., Any] | str
        if _forks():
            warm_up()
            entry, arguments = _forked_rank, [list(argv), dict(os.environ)]
        else:
            entry, arguments = sys.executable, ["-u", "-m", "fusemega", *argv]
        previous = signal.signal(signal.SIGUSR1, lambda number, _: _pass_on(number, folder))
        try:
            elastic_launch(config, entry)(*arguments)
            return 0
        except ChildFailedError:
            if (folder / "error").is_file():
                raise UserError((folder / "error").read_text(encoding="utf-8")) from None
            return 1
        except SignalException as stop:
            return 128 + int(stop.sigval)
        finally:
            signal.signal(signal.SIGUSR1, previous)


def join_launch() -> None:
    """In a rank: from now on signals that the parent passes on arrive here. Nothing where no parent listens."""
    if folder := _launch_folder():
        (folder / f"{os.getpid()}.pid").touch()


def record_error(error: UserError) -> bool:
    """In a rank: leaves the line for the parent; the first rank to come is heard.

    Returns:
        False where no parent listens, and the caller must print the line itself.
    """
    folder = _launch_folder()
    if folder is None:
        return False
    # Written aside and linked, so that the parent never reads half a line and a later rank never replaces it.
    own = folder / f"error.{os.getpid()}"
    own.write_text(str(error), encoding="utf-8")
    with contextlib.suppress(FileExistsError):
        os.link(own, folder / "error")
    return True


def error_recorded() -> bool:
    """Whether some rank has left its line already: what fails afterwards is only the echo of it."""
    folder = _launch_folder()
    return folder is not None and (folder / "error").exists()


@contextlib.contextmanager
def _meeting_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fusemega-") as folder:
        os.environ[LAUNCH_FOLDER] = folder
        try:
            yield Path(folder)
        finally:
            del os.environ[LAUNCH_FOLDER]


def _launch_folder() -> Path | None:
    return Path(os.environ[LAUNCH_FOLDER]) if LAUNCH_FOLDER in os.environ else None


def _pass_on(number: int, folder: Path) -> None:
    for joined in folder.glob("*.pid"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(joined.stem), number)


def _forks() -> bool:
    import torch

    return not torch.cuda.is_available()


def _forked_rank(argv: list[str], environment: dict[str, str]) -> None:
    """A rank that the fork server forked: the parent's environment, torch's thread count, then the command."""
    import torch

    from fusemega.cli import main

    os.environ.update(environment)  # the fork server's is as old as itself
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # libgomp read the variable before it was set
    try:
        main(argv)
    except Exception:
        traceback.print_exc()  # torch would keep it for the parent's report, which is not shown
        sys.exit(1)
