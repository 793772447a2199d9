"""Output folders and files that appear complete or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from fusemega.errors import UserError
from fusemega.files.integrity import FILE as INTEGRITY
from fusemega.files.json_files import read_json
from fusemega.files.lock import locked
from fusemega.files.owned import check_scratch, drop_scratch, mark_scratch, scratch_of

INSIDE = "out"
"""Name, in a temporary folder, of the file or folder that becomes the output."""


def refuse_existing(path: Path) -> None:
    """Refuses an output that would overwrite something, or add to what is complete; to be called before any long work.

    Raises:
        UserError: `path` exists and is not an empty folder, is the current folder or one above it, or lies in a folder
            whose integrity.json lists all of it.
    """
    if Path.cwd().is_relative_to(os.path.abspath(path)):
        raise UserError(f"{path}: is the current folder or a parent of it; it is not replaced")
    for above in Path(os.path.realpath(path)).parents:
        if (above / INTEGRITY).is_file():
            raise UserError(f"{path}: {above} is complete ({INTEGRITY} lists its files); choose a place outside it")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: exists and is not an empty folder; nothing is overwritten")


def check_writable(path: Path) -> None:
    """Refuses a path that could not be written; to be called before any long work. Creates nothing.

    Raises:
        UserError: a file stands where a folder would have to be, or the nearest existing folder cannot be written.
    """
    above = Path(os.path.abspath(path))
    while not os.path.lexists(above):
        above = above.parent
    if above.is_dir() and not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot write there: no permission to write in {above}")
    if not above.is_dir() and above != Path(os.path.abspath(path)):
        raise UserError(f"{path}: cannot write there: {above} is not a folder")


def check_output_file(path: Path) -> None:
    """`check_writable` for a file, which may be there already."""
    if path.is_dir():
        raise UserError(f"{path}: cannot write there: it is a folder")
    check_writable(path)


def check_result_file(path: Path, keys: Collection[str], what: str) -> None:
    """`check_output_file` for a JSON file that may replace an earlier result of the same kind, and nothing else.

    Args:
        path: the file.
        keys: what such a result has.
        what: its name for the message, as "a result of an evaluation".

    Raises:
        UserError: it cannot be written, or a file is there that holds no such result.
    """
    check_output_file(path)
    if os.path.lexists(path):
        try:
            found = set(read_json(path))
        except UserError:
            found = set()
        if not found.issuperset(keys):
            raise UserError(f"{path}: exists and is not {what}; it is not replaced")


@contextmanager
def new_folder(path: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """A temporary folder to write into, renamed to `path` when the block ends well. One process.

    Args:
        path: the folder to appear; absent, or present and empty.
        needed_bytes: size of the output; the call is refused at once when the disk has less room.

    Raises:
        UserError: the folder is not empty, cannot be made, another process is making it, or the disk is full; nothing
            is left behind.
    """
    refuse_existing(path)
    with scratch(path, needed_bytes) as place:
        refuse_existing(path)  # another process may have finished it meanwhile
        (place / INSIDE).mkdir()
        yield place / INSIDE
        publish(place / INSIDE, Path(os.path.realpath(path)))


@contextmanager
def new_file(path: Path) -> Iterator[TextIO]:
    """A text file to write into, which appears as `path` when the block ends well, or not at all.

    Raises:
        UserError: `path` exists, cannot be written, another process is writing it, or the disk is full; nothing is left
            behind.
    """
    if os.path.lexists(path):
        raise UserError(f"{path}: exists; nothing is overwritten")
    with scratch(path) as place:
        if os.path.lexists(path):
            raise UserError(f"{path}: exists; nothing is overwritten")
        with open(place / INSIDE, "w", encoding="utf-8") as file:
            yield file
        publish_file(place / INSIDE, path)


@contextmanager
def scratch(path: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """The empty temporary folder `.NAME.incomplete` of an output, on its file system; removed when the block ends.

    The block holds the output's lock. What a killed process left in the folder is removed first.

    Raises:
        UserError: see `new_folder`; or a file or folder that is not ours has that name.
    """
    check_writable(path)
    place = scratch_of(path)
    with locked(path), disk_errors(path):
        check_scratch(place)
        drop_scratch(place)
        mark_scratch(place)
        try:
            check_room(path, place, needed_bytes)
            yield place
        finally:
            drop_scratch(place)


def check_room(path: Path, place: Path, needed_bytes: int) -> None:
    """Refuses an output for which the disk of the folder `place` has less room than it needs."""
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise UserError(f"{path}: needs {needed_bytes / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB free")


def publish_file(temporary: Path, path: Path) -> None:
    """Rename a finished file to `path`, in place of an older one, on disk before the function returns."""
    # The content goes to disk before the name: otherwise a power failure could leave the name on an empty file.
    sync(temporary)
    real = Path(os.path.realpath(path))
    os.replace(temporary, real)
    sync(real.parent)  # a rename is on disk only when the folder that holds the name is


def publish(temporary: Path, path: Path) -> None:
    """Rename a finished folder to `path`. All its files are on disk before the rename, and the new name after it."""
    for folder, _, files in os.walk(temporary):
        for name in [*files, "."]:  # the folder itself holds the names of its files
            sync(os.path.join(folder, name))
    os.rename(temporary, path)
    sync(path.parent)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a full disk, or a place that cannot be written, into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{path}: the disk is full") from None
        if error.errno == errno.EFBIG:
            raise UserError(f"{path}: a file grew larger than this process or file system may write") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise UserError(f"{path}: cannot write there: {error.strerror}") from None
        raise


def sync(path: str | Path) -> None:
    """Puts a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_output(path: Path, text: str) -> None:
    """A command's output of one small text file: as `write_durably`, in a folder that is made if it is missing.

    Raises:
        UserError: the disk is full, or the place cannot be written.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, text)


def write_durably(path: Path, text: str) -> None:
    """Replace a small text file atomically, on disk before the function returns."""
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)
