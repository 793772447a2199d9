"""Folders that all nodes must see alike: what a run file names, read on each node; its output, written from each."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from fusemega.preflight.findings import existing

_EDGE_BYTES = 1 << 16
_MOST_FILES = 2000  # of a folder, which are compared by name and size
_PATIENCE_SECONDS = 15.0  # for a network file system to show what another node wrote


def paths_in(values: Mapping[str, Any]) -> dict[str, str]:
    """Values of a run file that look like paths of inputs, by key: texts with a slash, without the output."""
    return {key: text for key, text in _texts(values, "") if "/" in text and key != "output_dir" and "://" not in text}


def seen(path: str) -> str | None:
    """What is at a path, in words that differ where the contents do; None if there is nothing.

    Of a folder, names and sizes of its files count, and the bytes of its config.json; of a file, its size and ends.
    """
    place = Path(path)
    try:
        if place.is_dir():
            files = sorted(file for file in place.iterdir() if file.is_file() and not file.name.startswith("."))
            listed = [(file.name, file.stat().st_size) for file in files[:_MOST_FILES]]
            digest = xxhash.xxh3_64(repr(listed).encode())
            if (place / "config.json").is_file():
                digest.update((place / "config.json").read_bytes())
            return f"a folder of {len(files)} file(s), {sum(size for _, size in listed)} bytes, {digest.hexdigest()}"
        if place.is_file():
            size = place.stat().st_size
            with open(place, "rb") as file:
                digest = xxhash.xxh3_64(file.read(_EDGE_BYTES))
                file.seek(max(0, size - _EDGE_BYTES))
                digest.update(file.read(_EDGE_BYTES))
            return f"a file of {size} bytes, {digest.hexdigest()}"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


class Token:
    """A small file of this rank in a folder that should be shared; removed by `remove`.

    Args:
        output: the output folder; while it is not there, the nearest folder above it is taken.
    """

    def __init__(self, output: str) -> None:
        self.folder = existing(Path(output))
        self._path: Path | None = None

    def write(self, rank: int) -> tuple[str, str] | None:
        """Writes it. Returns its path and text; None where that cannot be."""
        text, path = secrets.token_hex(16), self.folder / f".fusemega-preflight-{rank}-{secrets.token_hex(6)}"
        try:
            with open(path, "x", encoding="ascii") as file:
                self._path = path
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            return None
        return str(path), text

    def remove(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def is_seen(path: str, text: str) -> bool:
    """Whether this node sees a token of another with its text, after a while at most."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            os.listdir(Path(path).parent)  # has a network file system look again
            if Path(path).read_text(encoding="ascii") == text:
                return True
        except (OSError, UnicodeDecodeError):
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.2)


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            yield from _texts(inner, f"{key}.{number}")
    elif isinstance(value, str):
        yield key, value
