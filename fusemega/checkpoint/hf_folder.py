"""A Hugging Face model folder, read with suspicion: safetensors only, every shard checked before any is used."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fusemega.errors import UserError, nearest
from fusemega.models.rules import Box, slices

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_HASH_CHUNK_BYTES = 1 << 24
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# Of the configuration, these say where weights came from and how they are stored, not what the model computes.
_STORAGE_KEYS = frozenset({"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"})


@dataclass(frozen=True)
class _Entry:
    shard: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file
    stop: int


class HFFolder:
    """A local model folder: its configuration, and its tensors by name.

    Opening checks the whole folder without reading weights: the index and the shards agree, each shard's header is
    sound, and each file has the size its header says.

    Raises:
        UserError: names the file and what is wrong with it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such model folder")
        self.config = read_json(self.path / "config.json")
        self._entries = self._open()
        self._handles: dict[Path, Any] = {}

    def keys(self) -> list[str]:
        """Tensor names, sorted."""
        return sorted(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Data type of a tensor.

        Raises:
            UserError: no such tensor, or one of a type that is not a plain float (quantised weights).
        """
        entry = self._entry(name)
        if entry.dtype not in DTYPES:
            raise UserError(
                f"{entry.shard}: tensor {name} is of type {entry.dtype}; supported: {', '.join(sorted(DTYPES))}"
            )
        return DTYPES[entry.dtype]

    def location(self, name: str) -> tuple[Path, int]:
        """The file a tensor lies in, and its first byte there; the elements follow in row-major order."""
        entry = self._entry(name)
        return entry.shard, entry.start

    def read(self, name: str, box: Box) -> torch.Tensor:
        """The box of a tensor, on the CPU, in the file's dtype. Only that box's bytes are read."""
        entry = self._entry(name)
        self.dtype(name)
        try:
            if entry.shard not in self._handles:
                self._handles[entry.shard] = safe_open(entry.shard, framework="pt")
            return self._handles[entry.shard].get_slice(name)[slices(box)]
        except (OSError, SafetensorError) as error:
            raise UserError(f"{entry.shard}: cannot read tensor {name}: {error}") from None

    def content_hash(self) -> str:
        """32 hex digits of blake2b over the configuration and every tensor's name, type, shape and bytes.

        Independent of the split into shards and of keys that do not change what the model computes. Reads all
        weights once, about a second a GB; the result is kept.
        """
        return self._content_hash

    @cached_property
    def _content_hash(self) -> str:
        config = json.dumps(functional_config(self.config), sort_keys=True)
        digest = hashlib.blake2b(config.encode(), digest_size=16)
        for name in self:
            entry = self._entries[name]
            digest.update(json.dumps([name, entry.dtype, entry.shape]).encode())
            with open(entry.shard, "rb") as file:
                file.seek(entry.start)
                for at in range(entry.start, entry.stop, _HASH_CHUNK_BYTES):
                    digest.update(file.read(min(_HASH_CHUNK_BYTES, entry.stop - at)))
        return digest.hexdigest()

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise UserError(f"{self.path}: no tensor {name!r}{nearest(name, self._entries)}")
        return self._entries[name]

    def _open(self) -> dict[str, _Entry]:
        if (self.path / SINGLE_FILE).exists():
            return dict(_read_header(self.path / SINGLE_FILE))
        index_path = self.path / INDEX_FILE
        if not index_path.exists():
            pickles = sorted(file.name for file in self.path.iterdir() if file.suffix in _PICKLE_SUFFIXES)
            if pickles:
                raise UserError(
                    f"{self.path / pickles[0]}: pickled weights are refused, because loading them runs code; "
                    f"convert the folder to safetensors"
                )
            raise UserError(f"{self.path}: neither {SINGLE_FILE} nor {INDEX_FILE} is there")
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise UserError(f"{index_path}: weight_map is not a mapping of tensor names to file names")
        entries: dict[str, _Entry] = {}
        for file in sorted(set(weight_map.values())):
            # Checked as text, because the shards of a hub cache are links that lead out of the folder by design.
            if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts or "\\" in file:
                raise UserError(f"{index_path}: weight_map names a file outside the folder: {file!r}")
            shard = self.path / file
            if not shard.exists():
                raise UserError(f"{shard}: missing, and {INDEX_FILE} names it")
            for name, entry in _read_header(shard):
                if weight_map.get(name) != file:
                    where = f"places it in {weight_map[name]}" if name in weight_map else "does not name it"
                    raise UserError(f"{shard}: holds tensor {name}, but {INDEX_FILE} {where}")
                entries[name] = entry
        for name, file in weight_map.items():
            if name not in entries:
                raise UserError(f"{self.path / file}: does not hold tensor {name}, which {INDEX_FILE} places there")
        return entries


def functional_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the keys that only say where weights came from and how they are stored."""
    return {key: value for key, value in config.items() if key not in _STORAGE_KEYS}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: missing, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: malformed JSON: {error.msg}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def _read_header(shard: Path) -> Iterator[tuple[str, _Entry]]:
    """Every tensor of a safetensors file; refuses a file whose size or header is not what the other says."""
    try:
        size = shard.stat().st_size
        with open(shard, "rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if size < 8 or header_bytes > min(size - 8, _MAX_HEADER_BYTES):
                raise UserError(f"{shard}: truncated, or not a safetensors file ({size} bytes)")
            header = json.loads(file.read(header_bytes))
    except OSError as error:
        raise UserError(f"{shard}: cannot read: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{shard}: not a safetensors file: its header is not JSON") from None
    try:
        header.pop("__metadata__", None)
        tensors = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        at = 0
        out = []
        for name, info in tensors:
            start, stop = info["data_offsets"]
            shape = tuple(info["shape"])
            bytes_each = _bytes_each(info["dtype"])
            if start != at or stop < start or (bytes_each and stop - start != math.prod(shape) * bytes_each):
                raise UserError(f"{shard}: corrupt header: tensor {name} does not fill its place in the file")
            at = stop
            base = 8 + header_bytes
            out.append((name, _Entry(shard, info["dtype"], shape, base + start, base + stop)))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{shard}: corrupt header: not in the safetensors format") from None
    expected = 8 + header_bytes + at
    if size != expected:
        state = "truncated" if size < expected else "too long"
        raise UserError(f"{shard}: {state}: {size} bytes, and its header says {expected}")
    yield from out


def _bytes_each(dtype: str) -> int:
    return DTYPES[dtype].itemsize if dtype in DTYPES else 0
