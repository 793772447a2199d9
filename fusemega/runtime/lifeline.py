"""No process outlives the one that it works for, however that one ends.

The parent that counts is a process of fusemega: the command for its workers, the launcher for its ranks, a rank for
what it forks, a pipeline for the commands that it starts; and torchrun for its ranks. A process that somebody else
started (a shell, srun, a daemon) is that one's business, and outlives it.

The kernel does it (PR_SET_PDEATHSIG), so it works as well for a process that is stopped or busy in a library. That
signal comes when the *thread* dies that made the child, hence only children of main threads are tied so; children of
other threads, and those of systems that know no such signal, look once a second whether their parent has changed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from pathlib import Path

PARENT = "FUSEMEGA_PARENT"  # id of the fusemega process that starts this one, and that this one must not outlive
_PR_SET_PDEATHSIG = 1
_forking: tuple[int, bool] = (0, False)  # of the last fork: the parent's id, and whether its main thread forked


def die_with(parent: int, by: signal.Signals = signal.SIGKILL) -> None:
    """From now on this process gets the signal `by` when `parent`, its parent, dies; at once where that is dead.

    Args:
        parent: its main thread has started this process.
    """
    if not _ask_kernel(by):
        _look_on(parent)
    if os.getppid() != parent:
        os.kill(os.getpid(), by)


def keep_children() -> None:
    """What this process and its descendants fork from now on dies with the process that forked it."""
    if not _forking[0]:
        _note_fork()
        os.register_at_fork(before=_note_fork, after_in_child=_follow)


def follow_starter() -> None:
    """`die_with` for a process that begins: whoever `PARENT` names, or a torchrun that is the direct parent.

    The death of a torchrun is a TERM, upon which a trainer saves a checkpoint: a signal to all of a job ends a torchrun
    that knows nothing of it, when its ranks are about to save.
    """
    named, parent = os.environ.pop(PARENT, None), os.getppid()
    if named is not None:
        die_with(int(named))
    elif "TORCHELASTIC_RUN_ID" in os.environ and _is_torchrun(parent):
        die_with(parent, by=signal.SIGTERM)


def child_environment() -> dict[str, str]:
    """This process's environment for a fusemega command that it starts, and that must not outlive it."""
    return os.environ | {PARENT: str(os.getpid())}


def _note_fork() -> None:
    global _forking
    _forking = (os.getpid(), threading.current_thread() is threading.main_thread())


def _follow() -> None:
    parent, by_main_thread = _forking
    if by_main_thread:
        die_with(parent)
    else:
        _look_on(parent)


def _ask_kernel(by: signal.Signals) -> bool:
    try:
        return ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(by), 0, 0, 0) == 0
    except (OSError, AttributeError):  # not Linux
        return False


def _look_on(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _is_torchrun(process: int) -> bool:
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(os.path.basename(word) == b"torchrun" or word.startswith(b"torch.distributed.") for word in words)
