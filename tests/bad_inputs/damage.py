"""Ways to damage a file of the base: each returns the function that does it, in the current folder."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from fusemega.align.vocabulary_map import VocabularyMap
from fusemega.files.integrity import write_integrity
from fusemega.store.shard import _CHECKSUM, _HEADER, INDEX
from tests.bad_inputs.base import ROWS

Damage = Callable[[], object]
ABSENT = object()


def put(path: str, content: str | bytes | object) -> Damage:
    """Another content: text, bytes, or a value written as JSON."""

    def do() -> None:
        given = content if isinstance(content, (str, bytes)) else json.dumps(content)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(given if isinstance(given, bytes) else given.encode())

    return do


def rows(*values: object) -> Damage:
    """data.jsonl with these rows (text, bytes, or values written as JSON) after its first row."""

    def do() -> None:
        lines = [value if isinstance(value, (str, bytes)) else json.dumps(value) for value in (ROWS[0], *values)]
        Path("data.jsonl").write_bytes(b"".join(x if isinstance(x, bytes) else x.encode() + b"\n" for x in lines))

    return do


def key(path: str, dotted: str, value: object = ABSENT) -> Damage:
    """Another value at a key of a JSON file, or the key taken out."""

    def do() -> None:
        whole = place = json.loads(Path(path).read_text())
        *above, last = dotted.split("/")
        for part in above:
            place = place[part]
        if value is ABSENT:
            del place[last]
        else:
            place[last] = value
        Path(path).write_text(json.dumps(whole))

    return do


def gone(path: str) -> Damage:
    """A file or folder taken away."""
    return lambda: shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def copied(path: str, to: str) -> Damage:
    """A folder once more, under another name."""
    return lambda: shutil.copytree(path, to)


def folder(path: str) -> Damage:
    """An empty folder, in place of what was there."""

    def do() -> None:
        if Path(path).exists():
            gone(path)()
        Path(path).mkdir(parents=True)

    return do


def cut(path: str, size: int) -> Damage:
    """The first `size` bytes only; all but the last ones where it is negative."""
    return lambda: Path(path).write_bytes(Path(path).read_bytes()[:size])


def fifo(path: str) -> Damage:
    """A FIFO in place of what was there: who opens it without care waits for ever."""

    def do() -> None:
        Path(path).unlink(missing_ok=True)
        os.mkfifo(path)

    return do


def entry(**values: float) -> Damage:
    """The store's shard with other values in its index's first entry, and every checksum made right."""

    def do() -> None:
        path = Path("store/shard-00000-000000.bin")
        content = path.read_bytes()
        magic, owner, rows, size, _ = _HEADER.unpack_from(content)
        origin = _HEADER.size + _CHECKSUM.size
        index = np.frombuffer(content, INDEX, rows, origin).copy()
        for name, value in values.items():
            index[name][0] = value
        header = _HEADER.pack(magic, owner, rows, size, zlib.crc32(index.tobytes()))
        codes = content[origin + rows * INDEX.itemsize :]
        path.write_bytes(header + _CHECKSUM.pack(zlib.crc32(header)) + index.tobytes() + codes)

    return do


def sealed(path: str) -> Damage:
    """A folder's integrity.json made anew: it says that the damage is what was written."""
    return lambda: write_integrity(Path(path))


def longer(path: str) -> Damage:
    """One byte too many at the end."""
    return lambda: Path(path).write_bytes(Path(path).read_bytes() + b"x")


def flip(path: str, at: int) -> Damage:
    """One byte's bits turned; counted from the end where negative."""

    def do() -> None:
        content = bytearray(Path(path).read_bytes())
        content[at] ^= 0xFF
        Path(path).write_bytes(content)

    return do


def swap(path: str, old: bytes, new: bytes) -> Damage:
    """`old` replaced by `new` wherever it stands; it must stand somewhere."""

    def do() -> None:
        content = Path(path).read_bytes()
        assert old in content
        Path(path).write_bytes(content.replace(old, new))

    return do


def tensors(path: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    """A safetensors file after `change` of its mapping of names to tensors."""

    def do() -> None:
        values = load_file(path)
        change(values)
        save_file({name: value.contiguous() for name, value in values.items()}, path, metadata={"format": "pt"})

    return do


def header(path: str, change: Callable[[dict[str, Any]], Any]) -> Damage:
    """A safetensors file with its JSON header changed in place, or replaced by what `change` returns; the same bytes
    stand behind it."""

    def do() -> None:
        content = Path(path).read_bytes()
        size = int.from_bytes(content[:8], "little")
        value = json.loads(content[8 : 8 + size])
        value = change(value) or value
        text = json.dumps(value).encode()
        text += b" " * (-len(text) % 8)
        Path(path).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])

    return do


def mapped(path: str, **facts: Any) -> Damage:
    """A vocabulary map that says other things of itself."""
    return lambda: replace(VocabularyMap.load(path), **facts).save(path)


def celled(path: str, representatives: dict[int, int] | None = None, file_format: int = 3) -> Damage:
    """A vocabulary map of kind cells, in which each id is a cell but for those given; of a format."""

    def do() -> None:
        made = VocabularyMap.load(path)
        cell_T = np.arange(made.target_size, dtype=np.int32)
        for token, other in (representatives or {}).items():
            cell_T[token] = other
        replace(made, kind="cells", cell_T=cell_T).save(path)
        with np.load(path) as file:
            arrays = dict(file)
        facts = json.loads(arrays["facts"].tobytes()) | {"format": file_format}
        arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)
        with Path(path).open("wb") as out:
            np.savez(out, **arrays)

    return do


def parquet(path: str, **columns: list[Any]) -> Damage:
    """A parquet file of these columns."""

    def do() -> None:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), path)

    return do
