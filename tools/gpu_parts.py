"""Files as archives of a bounded size: one compressed tar, cut into parts that are joined again before it is read.

A part's name begins with a hash of what its group holds, so equal content is not packed twice.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fusemega.files.output import publish_file, sync

BLOCK = 1 << 20
LEVEL = 1
"""gzip's: wheels are compressed already, and higher levels win 2 % on weights."""


@dataclass(frozen=True)
class Item:
    """A file to be packed: its path in the archive, and its content, or where that lies."""

    name: str
    content: bytes | Path
    executable: bool = False

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The content, from its first byte."""
        with io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content.open("rb") as file:
            yield file

    def described(self) -> dict[str, Any]:
        """What the manifest says of the file."""
        digest, size = hashlib.sha256(), 0
        with self.open() as file:
            while block := file.read(BLOCK):
                digest.update(block)
                size += len(block)
        return {"bytes": size, "sha256": digest.hexdigest(), "executable": self.executable}


class _Parts:
    """A file for writing that goes on in a new one whenever `most` bytes are full."""

    def __init__(self, folder: Path, stem: str, most: int) -> None:
        self.folder, self.stem, self.most = folder, stem, most
        self.done: list[dict[str, Any]] = []
        self._begin()

    def _begin(self) -> None:
        self.name = f"{self.stem}.{len(self.done) + 1:02d}.part"
        self.file, self.digest, self.size = (self.folder / f"{self.name}.tmp").open("wb"), hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), BLOCK):
            block = view[start : start + BLOCK]
            while len(block):
                if self.size == self.most:
                    self.end()
                    self._begin()
                now = block[: self.most - self.size]
                self.file.write(now)
                self.digest.update(now)
                self.size += len(now)
                block = block[len(now) :]
        return len(view)

    def flush(self) -> None:
        self.file.flush()

    def end(self) -> None:
        self.file.close()
        publish_file(self.folder / f"{self.name}.tmp", self.folder / self.name)
        self.done.append({"name": self.name, "bytes": self.size, "sha256": self.digest.hexdigest()})


def pack(folder: Path, group: str, items: list[Item], most: int, before: dict[str, Any] | None) -> dict[str, Any]:
    """Writes a group's parts into `folder`; what the manifest says of the group.

    Args:
        folder: where the parts appear, each complete.
        group: its name.
        items: its files.
        most: bytes of a part.
        before: what an older manifest says of the group. Its parts stay if they hold just this.
    """
    files = {item.name: item.described() for item in sorted(items, key=lambda item: item.name)}
    if before is not None and before["files"] == files and _whole(folder, before["parts"], most):
        return before
    words = "".join(f"{name} {of['sha256']} {of['executable']}\n" for name, of in files.items())
    parts = _Parts(folder, f"{group}-{hashlib.sha256(words.encode()).hexdigest()[:12]}", most)
    with gzip.GzipFile("", "wb", LEVEL, parts, mtime=0) as stream:
        with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar:
            for item in sorted(items, key=lambda item: item.name):
                entry = tarfile.TarInfo(item.name)
                entry.size, entry.mode = files[item.name]["bytes"], 0o755 if item.executable else 0o644
                with item.open() as file:
                    tar.addfile(entry, file)
    parts.end()
    return {"files": files, "parts": parts.done}


def _whole(folder: Path, parts: list[dict[str, Any]], most: int) -> bool:
    """Whether the parts are there, as they were written, and of the size that is asked for."""
    full = [part["bytes"] == most for part in parts[:-1]]
    return all(full) and parts[-1]["bytes"] <= most and all(_is(folder / part["name"], part) for part in parts)


def _is(path: Path, part: dict[str, Any]) -> bool:
    return path.is_file() and Item(path.name, path).described()["sha256"] == part["sha256"]


def drop_others(folder: Path, keep: set[str]) -> None:
    """Removes parts, whole and begun, that no manifest names any more."""
    for path in folder.iterdir():
        if path.name not in keep and re.fullmatch(r"[a-z]+-[0-9a-f]{12}\.\d+\.part(\.tmp)?", path.name):
            path.unlink()
    sync(folder)
