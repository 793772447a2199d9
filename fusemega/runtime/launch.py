"""Several processes on this machine from one command: torchrun, with one error line instead of N tracebacks.

The ranks of such a run are the same command again. A rank that meets a UserError leaves its line in the file that
`FUSEMEGA_ERROR_FILE` names (`record_error`); the parent, which outlives them all, raises it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from fusemega.errors import UserError

ERROR_FILE = "FUSEMEGA_ERROR_FILE"


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
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    # Hopper and earlier overlap tensor-parallel communication with compute only in a single hardware queue.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # torchrun reports every failed rank at length; the rank has said it already.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)

    with tempfile.TemporaryDirectory(prefix="fusemega-") as folder:
        error_file = Path(folder) / "error"
        os.environ[ERROR_FILE] = str(error_file)
        previous = signal.signal(signal.SIGUSR1, _pass_on)
        try:
            torchrun.run(
                torchrun.parse_args(["--standalone", "--nproc-per-node", str(nproc), "--module", "fusemega", *argv])
            )
            return 0
        except ChildFailedError:
            if error_file.is_file():
                raise UserError(error_file.read_text(encoding="utf-8")) from None
            return 1
        except SignalException as stop:
            return 128 + int(stop.sigval)
        finally:
            signal.signal(signal.SIGUSR1, previous)
            del os.environ[ERROR_FILE]


def record_error(error: UserError) -> bool:
    """In a rank of `run_under_torchrun`: leaves the line for the parent; the first rank to come is heard.

    Returns:
        False where no parent listens, and the caller must print the line itself.
    """
    path = os.environ.get(ERROR_FILE)
    if path is None:
        return False
    # Written aside and linked, so that the parent never reads half a line and a later rank never replaces it.
    own = Path(f"{path}.{os.getpid()}")
    own.write_text(str(error), encoding="utf-8")
    with contextlib.suppress(FileExistsError):
        os.link(own, path)
    return True


def error_recorded() -> bool:
    """Whether some rank has left its line already: what fails afterwards is only the echo of it."""
    path = os.environ.get(ERROR_FILE)
    return path is not None and Path(path).exists()


def _pass_on(signum: int, frame: FrameType | None) -> None:
    import psutil

    for child in psutil.Process().children():
        child.send_signal(signum)
