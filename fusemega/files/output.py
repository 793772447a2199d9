"""Output folders and files that appear whole or not at all, and checks whose verdict all ranks share."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from fusemega.errors import UserError

if TYPE_CHECKING:  # megatron-core takes seconds to import, and conversions do without it
    from fusemega.runtime.parallel import World


def on_main(world: World, action: Callable[[], None]) -> None:
    """Run `action` on the main process; a UserError there is raised on every process. Collective."""
    message: str | None = None
    if world.is_main:
        try:
            action()
        except UserError as error:
            message = str(error)
    message = world.from_main(message)
    if message is not None:
        raise UserError(message)


def refuse_existing(path: Path) -> None:
    """Refuses an output that would overwrite something; to be called before any long work.

    Raises:
        UserError: `path` exists and is not an empty folder, or is the current folder or one above it.
    """
    if Path.cwd().is_relative_to(os.path.abspath(path)):
        raise UserError(f"{path}: the current folder, or one above it; nothing is put in its place")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: exists and is not an empty folder; nothing is overwritten")


def check_writable(path: Path) -> None:
    """Refuses a path that nothing could be written to; to be called before any long work. Makes nothing.

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


@contextmanager
def output_folder(path: Path, world: World, needed_bytes: int = 0) -> Iterator[Path]:
    """A temporary sibling to write into, renamed to `path` when the block ends well. Collective.

    Args:
        path: the folder to appear; absent, or present and empty.
        world: all its processes enter and leave together.
        needed_bytes: refused at once when the disk has less.

    Raises:
        UserError: the folder is not empty, cannot be made, or the disk is full; nothing is left behind.
    """
    path = Path(os.path.abspath(path))
    temporary = path.with_name(f".{path.name}.incomplete")
    on_main(world, lambda: _prepare(path, temporary, needed_bytes))
    try:
        with disk_errors(path):
            yield temporary
            world.barrier()
    except BaseException:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise

    def finish() -> None:
        with disk_errors(path):
            publish(temporary, path)

    on_main(world, finish)


@contextmanager
def new_folder(path: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """`output_folder` for a command of one process, which then needs no process groups."""
    path = Path(os.path.abspath(path))
    temporary = path.with_name(f".{path.name}.incomplete")
    _prepare(path, temporary, needed_bytes)
    try:
        with disk_errors(path):
            yield temporary
            publish(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def new_file(path: Path) -> Iterator[TextIO]:
    """A text file to write into, which appears as `path` when the block ends well, or not at all.

    Raises:
        UserError: `path` exists, cannot be written, or the disk is full; nothing is left behind.
    """
    if os.path.lexists(path):
        raise UserError(f"{path}: exists; nothing is overwritten")
    check_writable(path)
    temporary = path.with_name(f".{path.name}.incomplete")
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "w", encoding="utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, path)
            _sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _prepare(path: Path, temporary: Path, needed_bytes: int) -> None:
    refuse_existing(path)
    empty_folder(temporary, path, needed_bytes)


def empty_folder(temporary: Path, path: Path, needed_bytes: int) -> None:
    """Makes the folder `temporary`, in place of an older one.

    Raises:
        UserError: it cannot be made, or its disk has less room than `needed_bytes`; names `path`.
    """
    with disk_errors(path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        free = shutil.disk_usage(temporary).free
        if free < needed_bytes:
            temporary.rmdir()
            raise UserError(f"{path}: needs {needed_bytes / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB free")


def publish(temporary: Path, path: Path) -> None:
    """Rename a finished folder to `path`, with all its files on disk before and the name after."""
    for folder, _, files in os.walk(temporary):
        for name in [*files, "."]:
            _sync(os.path.join(folder, name))
    os.rename(temporary, path)
    _sync(path.parent)


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


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Replace a small text file atomically, on disk before the function returns."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync(path.parent)
