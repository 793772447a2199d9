"""Caches results of reading whole files, for as long as the files are not touched.

Files count as unchanged while their paths, sizes, inodes and times of change are the same (also the inode's time of
change, which tools that restore modification times cannot set). These times are no finer than a clock tick of the
system, or a second on some file systems. So nothing is cached for a file that was changed in the last two seconds,
because another change might leave no trace.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fusemega.errors import UserError
from fusemega.files.integrity import file_hash
from fusemega.files.json_files import read_json
from fusemega.files.output import write_durably

_SETTLED_SECONDS = 2.0


def remembered(files: Sequence[Path], what: str, find: Callable[[], Any], memory: Path) -> Any:
    """The result of `find()`, from the cache if the files are unchanged since it was computed.

    Args:
        files: the files that `find` reads; links are followed.
        what: name of the kind of result; each kind is cached separately.
        find: its result is JSON-able, and depends on the contents of the files alone.
        memory: folder of the cache; where it cannot be written, nothing is cached.
    """
    before, newest = _state(files, what)
    begun = time.time()
    note = memory / before
    with contextlib.suppress(UserError):
        if note.is_file() and (said := read_json(note, finite=False)).keys() == {what}:
            return said[what]
    value = find()
    with contextlib.suppress(OSError):
        # The state is compared again, because a file may have changed while `find` read it.
        if newest < begun - _SETTLED_SECONDS and _state(files, what)[0] == before:
            memory.mkdir(parents=True, exist_ok=True)
            write_durably(note, json.dumps({what: value}))
    return value


def content_hash(path: Path, memory: Path) -> str:
    """Hash, 32 hex digits, of a file's bytes, or of the names and bytes of a folder's files without hidden ones.

    Args:
        path: links are followed.
        memory: as in `remembered`.

    Raises:
        UserError: nothing is there, or something else than regular files.
    """
    real = Path(os.path.realpath(path))
    if not real.exists():
        raise UserError(f"{path}: no such file or folder")
    files = [real] if not real.is_dir() else sorted(_visible_files(real))

    def find() -> str:
        hashes = [(str(file.relative_to(real)), file_hash(file)) for file in files]
        return hashlib.blake2b(json.dumps(hashes).encode(), digest_size=16).hexdigest()

    return str(remembered(files, f"contents of {real}", find, memory))


def traces(files: Sequence[Path]) -> dict[str, list[int]]:
    """Resolved path -> size, and times of change of its content and its inode: of files too large to hash again.

    An unfinished output that was begun with the same traces may be continued, also on another machine (inodes and
    devices, which may differ there, are left out).
    """
    found = {}
    for path in files:
        status = path.stat()
        found[str(path.resolve())] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return found


def _visible_files(folder: Path) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return found


def _state(files: Sequence[Path], what: str) -> tuple[str, float]:
    """Hash of what identifies the files' state; and when the newest was last changed, in seconds since 1970."""
    real = [Path(os.path.realpath(file)) for file in files]
    stats = [(str(file), file.stat()) for file in real]
    state = [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_dev, s.st_ino) for name, s in stats]
    name = hashlib.blake2b(json.dumps([what, state]).encode(), digest_size=16).hexdigest()
    return name, max((max(s.st_mtime, s.st_ctime) for _, s in stats), default=0.0)
