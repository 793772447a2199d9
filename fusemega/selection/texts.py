"""Texts kept on disk, so that millions of responses take no memory: one file, and where each text begins in it."""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Texts:
    """Texts by number, in the order in which they were added."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "wb")  # noqa: SIM115  (closed by `opened_texts`)
        self._bounds = array("q", [0])
        self._map: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def add(self, content: bytes) -> int:
        """Keeps a text, UTF-8. Returns its number. To be called before any text is read."""
        self._file.write(content)
        self._bounds.append(self._bounds[-1] + len(content))
        return len(self._bounds) - 2

    def __getitem__(self, number: int) -> str:
        if self._map is None:
            self._file.close()
            if not self._bounds[-1]:
                return ""
            with open(self._path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map[self._bounds[number] : self._bounds[number + 1]].decode("utf-8")

    def close(self) -> None:
        """Closes the file, which stays."""
        self._file.close()
        if self._map is not None:
            self._map.close()


@contextmanager
def opened_texts(path: Path) -> Iterator[Texts]:
    """A new, empty `Texts` in the file `path`; closed when the block ends."""
    texts = Texts(path)
    try:
        yield texts
    finally:
        texts.close()
