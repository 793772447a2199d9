"""Several processes on this machine from one command: torchrun's contract, with one error line instead of N tracebacks.

The ranks of such a launch are the same command again, in the environment that torchrun would give them. They meet
their launcher in a folder (`runtime/meeting.py`), and end when it ends (`runtime/lifeline.py`).

Importing torch, megatron-core and transformers takes a core several seconds. Without CUDA the ranks are therefore
forked from one fresh process that has imported them once (multiprocessing's fork server); with CUDA, which does not
survive a fork and comes with cores enough, each rank is a Python of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker

from fusemega.errors import UserError
from fusemega.launch.ranks import Rank, Ranks
from fusemega.runtime import lifeline
from fusemega.runtime.meeting import LAUNCH_FOLDER, clear, is_heard, own_folder

# What a batch system or a terminal sends to every process of a job; the fork server is not to end before the ranks.
_JOB_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


def warm_up() -> None:
    """Begins to import what ranks need, in the background; for a command that is about to launch ranks."""
    if not _forks():
        return
    multiprocessing.set_forkserver_preload(["fusemega.launch.preloaded"])
    resource_tracker.ensure_running()  # it unblocks signals in passing
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _JOB_SIGNALS)  # blocked signals stay so in what is started
    told = {lifeline.PARENT: str(os.getpid()), LAUNCH_FOLDER: str(own_folder())}  # its socket lies there too
    os.environ.update(told)
    try:
        forkserver.ensure_running()
    finally:
        for name in told:
            del os.environ[name]
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def launch_ranks(argv: Sequence[str], nproc: int) -> int:
    """Runs `fusemega *argv` as `nproc` ranks on this machine and waits for them.

    The same as `python -m torch.distributed.run --standalone --nproc-per-node nproc -m fusemega *argv`, started from
    this process. TERM, INT, HUP, QUIT and USR1 are passed on to the ranks; a second TERM, INT, HUP or QUIT kills them.
    Where unset, OMP_NUM_THREADS becomes the cores' share of a rank.

    Returns:
        0; 1 where a rank failed (its traceback is on stderr); 128 + N where signal N ended the run, or ended a rank
        (a line on stderr names it).

    Raises:
        UserError: a rank raised one, or this process is itself a rank of a launcher.
    """
    if "WORLD_SIZE" in os.environ:
        raise UserError(
            f"--nproc {nproc}: this process is already rank {os.environ.get('RANK', '?')} of a launcher's "
            f"{os.environ['WORLD_SIZE']}; leave --nproc out under torchrun or srun"
        )
    import torch.distributed as dist

    folder = own_folder()
    clear(folder)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        # Hopper and earlier overlap tensor-parallel communication with compute only in a single hardware queue.
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // nproc)),
        **os.environ,  # after the defaults, so that what the user has set wins
        LAUNCH_FOLDER: str(folder),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is this process's, so that no two jobs race for a port
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
    }
    ranks = Ranks(folder)
    with _passing_on(ranks):
        try:
            for rank in range(nproc):
                ranks.add(_start(argv, environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, rank))
            status = ranks.wait()
        finally:
            ranks.end()
    return status


def _start(argv: Sequence[str], environment: dict[str, str], rank: int) -> Rank:
    if _forks():
        warm_up()
        process = multiprocessing.get_context("forkserver").Process(
            target=_forked_rank, args=(list(argv), environment), name=f"rank {rank}"
        )
        process.start()
        assert process.pid is not None
        return Rank(rank, process.pid, lambda: process.exitcode)
    # Signals reach the launcher's handlers only after this returns: none finds half a rank.
    child = subprocess.Popen(
        [sys.executable, "-u", "-m", "fusemega", *argv], env=environment | {lifeline.PARENT: str(os.getpid())}
    )
    return Rank(rank, child.pid, child.poll)


@contextmanager
def _passing_on(ranks: Ranks) -> Iterator[None]:
    """Passes this process's signals on to the ranks. Signals that are ignored (nohup) stay ignored."""
    heard = filter(is_heard, _JOB_SIGNALS)
    previous = {number: signal.signal(number, lambda number, _: ranks.signal(number)) for number in heard}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _forks() -> bool:
    import torch

    return not torch.cuda.is_available()


def _forked_rank(argv: list[str], environment: dict[str, str]) -> None:
    """A rank that the fork server forked: the parent's environment, torch's thread count, then `python -m fusemega`."""
    import torch

    os.environ.clear()  # the fork server's environment is that of its start
    os.environ.update(environment)
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)  # the fork server's handler is for itself alone (`preloaded`)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _JOB_SIGNALS)  # inherited: the fork server blocks them (`warm_up`)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # libgomp read the variable before it was set
    sys.argv = ["fusemega", *argv]
    runpy.run_module("fusemega", run_name="__main__", alter_sys=True)
