"""Ends every process with the process that it works for, in whatever way that one ends.

This applies to parents that are processes of fusemega: a command and its workers, a launcher and its ranks, a rank and
its forks, a pipeline and its commands; and to torchrun and its ranks. A process that another program started (a shell,
srun, a daemon) is not tied to it.

The kernel sends the signal (PR_SET_PDEATHSIG), so this also works for a process that is stopped or busy in a library.
The signal is sent when the *thread* that made the child ends, so only children of main threads use it. Children of
other threads, and of systems without this signal, check once a second whether their parent has changed.
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
    """From now on this process gets the signal `by` when `parent`, its parent, dies; at once if it is dead already.

    Args:
        parent: its main thread has started this process.
    """
    if not _ask_kernel(by):
        _look_on(parent)
    # The parent may have died before the request.
    if os.getppid() != parent:
        os.kill(os.getpid(), by)


def keep_children() -> None:
    """From now on every process that this process or a descendant forks dies with the process that forked it."""
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
