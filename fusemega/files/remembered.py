"""Hashes of files and folders, remembered as long as they are not touched: contents decide, and are read once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path

from fusemega.errors import UserError
from fusemega.files.integrity import file_hash
from fusemega.files.output import write_durably


def content_hash(path: Path, memory: Path) -> str:
    """Of a file's bytes; or of the names and bytes of a folder's files, hidden ones left out. 32 hex digits.

    A file counts as the same while its path, size, inode and times of change are (of its inode too, which what keeps
    modification times cannot set). One that changes while it is read is not remembered.

    Args:
        path: links are followed.
        memory: folder to remember the hashes in; where it cannot be written, nothing is remembered.

    Raises:
        UserError: there is nothing, or no plain file.
    """
    real = Path(os.path.realpath(path))
    if not real.exists():
        raise UserError(f"{path}: no such file or folder")
    files = [real] if not real.is_dir() else sorted(_visible_files(real))
    before = _state(real, files)
    note = memory / before
    if note.is_file() and re.fullmatch("[0-9a-f]{32}", found := note.read_text("utf-8", "replace")):
        return found
    hashes = [(str(file.relative_to(real)), file_hash(file)) for file in files]
    value = hashlib.blake2b(json.dumps(hashes).encode(), digest_size=16).hexdigest()
    with contextlib.suppress(OSError):
        if _state(real, files) == before:
            memory.mkdir(parents=True, exist_ok=True)
            write_durably(note, value)
    return value


def _visible_files(folder: Path) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return found


def _state(path: Path, files: list[Path]) -> str:
    stats = [(str(file), file.stat()) for file in files]
    state = [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in stats]
    return hashlib.blake2b(json.dumps([str(path), state]).encode(), digest_size=16).hexdigest()
