"""The folder in which the ranks of a launch and their launcher meet: process ids, error lines, tracebacks.

    TMPDIR/fusemega-XXXXXXXX/
      launcher             locked while the launcher lives; a folder whose lock is free is left over, and is removed
      PID.pid              a rank that handles the signals that its launcher passes on
      error                of the first rank with a UserError: whether it may be tried again, and the line
      traceback.RANK       of a rank with another error; the launcher shows the first one
      stopped              exit status of a run that a signal stopped regularly

Multiprocessing's sockets are in this folder too, so that nothing else is left behind.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from pathlib import Path
from types import FrameType

from fusemega.errors import Retryable, UserError

LAUNCH_FOLDER = "FUSEMEGA_LAUNCH"
REFUSED = "FUSEMEGA_REFUSED"  # a file of the batch script (slurm/lib.sh), to which torchrun passes on no exit status
# What gloo, the store and NCCL say when a peer is gone, or has not come for too long.
_ECHO = re.compile(
    r"onnection (closed|reset|refused)|Broken pipe|failed to recv|recvBytes|sendBytes|Connection was likely closed|"
    r"DistNetworkError|ncclRemoteError|remote process exited|Socket closed|Timed out waiting|Operation timed out|"
    r"ncclInternalError"
)
_PREFIX, _LOCK = "fusemega-", "launcher"
_RETRYABLE, _MISTAKE = "retryable", "mistake"  # the first line of `error`


@functools.cache
def own_folder() -> Path:
    """The launcher's folder: made at the first call, removed when this process ends or, if it is killed, by the next
    launch."""
    sweep()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    atexit.register(_remove, folder, os.getpid())
    descriptor = os.open(folder / f".{_LOCK}", os.O_CREAT | os.O_RDWR, 0o600)  # open as long as this process lives
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.rename(folder / f".{_LOCK}", folder / _LOCK)  # never there without its lock
    multiprocessing.current_process()._config["tempdir"] = _socket_folder(folder)  # type: ignore[attr-defined]
    return folder


def _socket_folder(folder: Path) -> str:
    """A short name of `folder`: a socket's may have 107 bytes, and a TMPDIR alone can be longer."""
    if len(os.fsencode(folder)) + len("/listener-12345678") <= 107:
        return str(folder)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)  # open as long as this process lives
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def sweep() -> None:
    """Removes the folders of this user's launchers that were killed."""
    for lock in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError):
            if lock.parent.is_symlink() or lock.lstat().st_uid != os.getuid():
                continue
            descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
            finally:
                os.close(descriptor)


def clear(folder: Path) -> None:
    """Removes what an earlier launch of this process left to read."""
    for path in folder.iterdir():
        if path.suffix == ".pid" or path.name.split(".")[0] in ("error", "traceback", "stopped"):
            path.unlink()


def launch_folder() -> Path | None:
    """In a rank: the folder of its launcher. None if it was started by another kind of launcher, or by none."""
    return Path(os.environ[LAUNCH_FOLDER]) if LAUNCH_FOLDER in os.environ else None


def join() -> None:
    """In a rank: from now on signals that the launcher passes on arrive here. Does nothing if no launcher listens.

    Those that end a process raise SystemExit, so that unfinished outputs are removed; what was ignored stays so.
    """
    if folder := launch_folder():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if is_heard(number):
                signal.signal(number, _leave)
        (folder / f"{os.getpid()}.pid").touch()


def record_error(error: UserError) -> bool:
    """In a rank: leaves the line for the launcher, which shows that of the first rank to come.

    Returns:
        False if no launcher listens, and the caller must print the line itself.
    """
    folder = launch_folder()
    if folder is None:
        return False
    # Written aside and linked, so that the launcher never reads half a line and a later rank never replaces it.
    own = folder / f"error.{os.getpid()}"
    own.write_text(f"{_RETRYABLE if isinstance(error, Retryable) else _MISTAKE}\n{error}", encoding="utf-8")
    with contextlib.suppress(FileExistsError):
        os.link(own, folder / "error")
    return True


def recorded_error(folder: Path) -> UserError | None:
    """In a launcher: the error of the first rank that has left one."""
    path = folder / "error"
    if not path.is_file():
        return None
    kind, _, line = path.read_text(encoding="utf-8").partition("\n")
    return Retryable(line) if kind == _RETRYABLE else UserError(line)


def note_refusal(error: UserError) -> None:
    """Leaves the line of a user's error for the batch script, which then does not try the same again.

    Not if it only says that another rank has gone, in the words of a save or a load that this has ended. The first line
    stays: of a stage, it is its command's own, and the recipe's only says that the command has failed.
    """
    path = os.environ.get(REFUSED)
    if path and not isinstance(error, Retryable) and not is_echo(error):
        with contextlib.suppress(OSError), open(path, "x", encoding="utf-8") as file:
            file.write(f"{error}\n")


def record_traceback(error: BaseException) -> bool:
    """In a rank: leaves the traceback for the launcher, which can tell a cause from an echo of another's end.

    Returns:
        False if no launcher listens.
    """
    folder = launch_folder()
    if folder is None:
        return False
    text = "".join(traceback.format_exception(error))
    (folder / f"traceback.{os.environ.get('RANK', '?')}").write_text(text, encoding="utf-8")
    return True


def is_heard(number: int) -> bool:
    """Whether to act on a signal: on all except a HUP or INT that this process was started to ignore."""
    return number not in (signal.SIGHUP, signal.SIGINT) or signal.getsignal(number) != signal.SIG_IGN


def is_echo(error: BaseException | str) -> bool:
    """Whether an error says no more than that another rank has ended, or does not answer."""
    return _ECHO.search(str(error)) is not None


def lost_peer(error: BaseException) -> UserError | None:
    """In a rank of a launcher of another kind: the line to show for an echo. None if it is not one, or has no peers."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or not is_echo(error):
        return None
    return UserError(
        f"rank {os.environ.get('RANK', '?')} on {socket.gethostname()}: another rank has ended or does not answer; "
        f"its own message, or its node's log, says why ({str(error).splitlines()[0]})"
    )


def stopped_status(number: int) -> int:
    """Exit status of a process that signal `number` stopped in good order: 128 + number, as a shell expects.

    A rank ends with 0, since to its launcher anything else is a crash; the launcher tells the shell.
    """
    if folder := launch_folder():
        (folder / "stopped").write_text(str(128 + number))
    return 0 if "WORLD_SIZE" in os.environ else 128 + number


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
