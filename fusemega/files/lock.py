"""One writer for each output: a lock beside it, `.NAME.fusemega.lock`, that names its holder and ends with its process.

The lock is `flock`'s. The kernel releases it when a process ends in any way, also over NFS (where clients pass it on to
the server). The file only says where the lock is and who holds it. It is removed with the lock; a file that a killed
process left blocks nobody.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fusemega.errors import Retryable, UserError, printable

_FIRST_WORD = "fusemega"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # from file systems without locks
_ENDING_SECONDS = 5.0  # how long the children of a killed holder are waited for
_held: dict[tuple[int, str], int] = {}
"""(process, lock file) -> how many blocks of that process hold it, so that nested steps do not block each other."""


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """The block is the only one, among all processes that see the file system, that writes the output `path`.

    Spelling does not matter: links, `..` and trailing slashes are resolved. Blocks of one process may be nested. Where
    a file system has no locks, one line on stderr says so, and the block runs without.

    Raises:
        Retryable: another process holds it (named, with its host).
        UserError: the lock file cannot be made.
    """
    lock, made = _place(path)
    key = (os.getpid(), str(lock))
    if _held.get(key):
        _held[key] += 1
        try:
            yield
        finally:
            _held[key] -= 1
        return
    descriptor = _take(lock, path)
    _held[key] = 1
    try:
        yield
    finally:
        if os.getpid() == key[0]:  # not in a process that was forked meanwhile
            del _held[key]
            if descriptor is not None:
                # Removed while still locked: a process that opened this file before sees, once it has the lock, that
                # the name is gone or belongs to another file, and tries again (`_is_at`).
                os.unlink(lock)
                os.close(descriptor)
            for folder in made:
                try:
                    folder.rmdir()
                except OSError:
                    break  # the output is in it


def holder_of(path: str | Path) -> str:
    """Who holds the output `path`, as its lock file says: "process N on HOST"; "" if nobody does, as far as is known.

    Nothing is locked: a process that begins meanwhile is not disturbed. A holder on another machine may have ended.
    """
    real = Path(os.path.realpath(path))
    try:
        said = (real.parent / f".{real.name}.fusemega.lock").read_bytes()[:400].decode("utf-8", "replace")
    except OSError:
        return ""
    words = said.split()
    return "" if words[:1] != [_FIRST_WORD] or _has_ended(said) else printable(" ".join(words[1:]))


def _place(path: str | Path) -> tuple[Path, list[Path]]:
    """The lock file; and the folders that had to be made for it, the innermost first."""
    real = Path(os.path.realpath(path))
    folder, made = real.parent, []
    while not os.path.lexists(folder):
        made.append(folder)
        folder = folder.parent
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{folder} is not a folder" if folder.exists() and not folder.is_dir() else error.strerror
        raise UserError(f"{path}: cannot write there: {reason}") from None
    if real.is_dir() and not os.access(real.parent, os.W_OK):  # a disk's own folder, for example
        return real / ".fusemega.lock", made
    return real.parent / f".{real.name}.fusemega.lock", made


def _take(lock: Path, path: str | Path) -> int | None:
    """The open lock file; None where the file system has no locks."""
    patience = time.monotonic() + _ENDING_SECONDS
    while True:
        # NOFOLLOW and NONBLOCK: a link that somebody put here is not followed, and a FIFO is not waited for.
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
        except OSError as error:
            raise UserError(f"{path}: cannot write there: {lock}: {error.strerror}") from None
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UserError(f"{lock}: is not a regular file, but stands where fusemega needs a lock; move it away")
            said = os.pread(descriptor, 400, 0).decode("utf-8", "replace")
            if said and not said.startswith(_FIRST_WORD):
                raise UserError(f"{lock}: is not a lock of fusemega, but stands where one is needed; move it away")
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if _has_ended(said) and time.monotonic() < patience:
                    os.close(descriptor)
                    time.sleep(0.05)
                    continue
                who = " ".join(said.split()[1:]) or "it has not said which"
                raise Retryable(
                    f"{path}: another process is writing it ({who}); wait until it ends, or choose another output"
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise UserError(f"{path}: cannot lock {lock}: {error.strerror}") from None
                sys.stderr.write(
                    printable(f"warning: {lock.parent}: file locks do not work here: start only one writer\n")
                )
                os.unlink(lock)
                os.close(descriptor)
                return None
            if _is_at(descriptor, lock):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{_FIRST_WORD} process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it between the opening and the lock


def _has_ended(said: str) -> bool:
    """Whether the holder that the lock file names was a process of this machine, and is no more. Children that it was
    about to start have the lock until they are other programs, a moment later."""
    words = said.split()
    if len(words) != 5 or words[4] != socket.gethostname() or not words[2].isdecimal():
        return False
    try:
        os.kill(int(words[2]), 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        pass
    return False


def _is_at(descriptor: int, lock: Path) -> bool:
    try:
        there, here = os.lstat(lock), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
