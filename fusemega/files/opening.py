"""Opens files from any source: regular files only, of limited size, whatever is at the path.

Opening a FIFO waits for a writer that may never come, and a device has no end. So files are opened with `O_NONBLOCK`,
which has no effect on regular files, and the opened file is checked (not the path, which may change in between).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path

from fusemega.errors import UserError

MIB = 1 << 20
TEXT_BYTES = 64 * MIB
"""Size limit of files that are read whole, unless the caller gives another. Gemma's tokenizer.json has 33 MiB."""
NAME_BYTES = 255  # the limit for one part of a path on the usual file systems

_KINDS: dict[str, Callable[[int], bool]] = {
    "a FIFO": stat.S_ISFIFO,
    "a socket": stat.S_ISSOCK,
    "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
}


def open_regular(path: str | Path, what: str = "") -> BufferedReader:
    """Opens the regular file at `path` for reading; links are followed.

    Args:
        what: what the file should be, for the message: "cannot read the run file".

    Raises:
        UserError: nothing is there, it cannot be opened, or it is something else than a regular file.
    """
    doing = f"{path}: cannot read{f' {what}' if what else ''}"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        # A socket, or the far end of a FIFO, cannot be opened at all.
        kind = "a socket or device" if error.errno == errno.ENXIO else None
        raise UserError(f"{doing}: {f'{kind}, not a regular file' if kind else error.strerror}") from None
    except ValueError:
        raise UserError(f"{doing}: the path has a character that file names cannot contain") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise UserError(f"{doing}: {os.strerror(errno.EISDIR)}")
        kind = next((name for name, holds in _KINDS.items() if holds(mode)), "something else")
        raise UserError(f"{doing}: {kind}, not a regular file")
    return os.fdopen(descriptor, "rb")


def require_regular(path: str | Path, what: str = "") -> None:
    """Checks a file as `open_regular` does, for a library that will open it itself."""
    open_regular(path, what).close()


def refuse_special_files(folder: Path) -> None:
    """Refuses special files in a folder and in the folders in it, before a library reads them; links are followed.

    Raises:
        UserError: a FIFO, a socket or a device is there.
    """
    for path in (*folder.iterdir(), *folder.glob("*/*")):
        try:
            mode = path.stat().st_mode
        except OSError:
            continue  # a dangling link: code that needs it reports it
        kind = next((name for name, holds in _KINDS.items() if holds(mode)), None)
        if kind is not None:
            raise UserError(f"{path}: {kind}, not a regular file")


def read_bytes(path: str | Path, limit: int = TEXT_BYTES, what: str = "") -> bytes:
    """A whole file.

    Raises:
        UserError: as `open_regular`; or it has more than `limit` bytes, or fails while it is read.
    """
    with open_regular(path, what) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            # One byte more than allowed shows that the file grew beyond the limit after its size was read.
            content = file.read(limit + 1) if size <= limit else b""
        except OSError as error:
            raise UserError(f"{path}: cannot read{f' {what}' if what else ''}: {error.strerror}") from None
    if max(size, len(content)) > limit:
        raise UserError(f"{path}: {max(size, len(content))} bytes; allowed: {limit}")
    return content


def read_text(path: str | Path, limit: int = TEXT_BYTES, what: str = "") -> str:
    """A whole UTF-8 file, a byte order mark left out.

    Raises:
        UserError: as `read_bytes`, or it is not UTF-8.
    """
    try:
        return read_bytes(path, limit, what).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None


def is_inside(name: str) -> bool:
    """Whether a relative path that was read from a file stays below its folder, and is a valid path of a file."""
    parts = name.split("/")
    return (
        name.isprintable()
        and "\\" not in name
        and all(part not in ("", ".", "..") and len(part.encode()) <= NAME_BYTES for part in parts)
    )
