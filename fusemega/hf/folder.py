"""Opens a Hugging Face model folder from any source: safetensors only; every shard is checked before any is used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from fusemega.errors import UserError, nearest
from fusemega.files.boxes import Box, slices
from fusemega.files.cache import cache_folder
from fusemega.files.json_files import read_json
from fusemega.files.moves import Stored
from fusemega.files.opening import is_inside, open_regular, refuse_special_files
from fusemega.files.remembered import remembered
from fusemega.files.safetensors_header import read_header
from fusemega.models.architecture import Architecture
from fusemega.models.registry import architecture_of

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_HASH_CHUNK_BYTES, _HASH_THREADS = 1 << 22, 4
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# Keys of the configuration that say where weights came from and how they are stored, not what the model computes.
_STORAGE_KEYS = frozenset(
    {"_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"}
)


@dataclass(frozen=True)
class _Entry:
    """The fields of a `Tensor`, and its file."""

    shard: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
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
        if (self.path / "adapter_config.json").is_file() and not any(self.path.glob("model*.safetensors*")):
            raise UserError(
                f"{self.path}: a LoRA adapter, not a model: merge it into its base with `fusemega convert "
                f"merge-adapter BASE {self.path} OUT`, or use BASE+{self.path} in the run file of a merge"
            )
        refuse_special_files(self.path)
        self.config = read_json(self.path / "config.json")
        self._entries = self._open()
        self._handles: dict[Path, Any] = {}
        self._hashes: dict[Path, dict[str, Any]] | None = None

    @cached_property
    def architecture(self) -> Architecture:
        """The architecture in its configuration, read when it is first asked for.

        Raises:
            UserError: the configuration is refused.
        """
        return architecture_of(self.config)

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

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._entry(name).shard

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

    def stored(self, name: str) -> Stored:
        """The file of a tensor and its place in it.

        Raises:
            UserError: as `dtype`.
        """
        entry = self._entry(name)
        dtype = str(self.dtype(name)).removeprefix("torch.")
        return Stored(name, str(entry.shard), entry.start, entry.shape, dtype)

    def files(self) -> list[Path]:
        """config.json and the files that hold weights."""
        return [self.path / "config.json", *sorted({entry.shard for entry in self._entries.values()})]

    def content_hash(self, digests: Mapping[str, str] | None = None) -> str:
        """32 hex digits of blake2b over the configuration and every tensor's name, type, shape and XXH3-128.

        Independent of the split into shards and of keys that do not change what the model computes. Reads as `hashes`.

        Args:
            digests: XXH3-128 of tensors that have been read already, by name. Only the others are read.
        """
        bits = dict(digests or {})
        if not bits:
            bits = {name: digest for shard in self.hashes().values() for name, digest in shard["tensors"].items()}
        config = json.dumps(functional_config(self.config), sort_keys=True)
        digest = hashlib.blake2b(config.encode(), digest_size=16)
        for name in sorted(self._entries):
            entry = self._entries[name]
            found = bits.get(name) or _bits_hash(entry)
            digest.update(json.dumps([name, entry.dtype, entry.shape, found]).encode())
        return digest.hexdigest()

    def hashes(self) -> dict[Path, dict[str, Any]]:
        """For each file of weights: `file`, its XXH3-128, and `tensors`, the XXH3-128 of each tensor by name.

        Reads all weights once, in the order of their bytes; not again as long as the files are not touched.
        """
        if self._hashes is None:
            memory = cache_folder() / "hashes"
            shards: dict[Path, dict[str, _Entry]] = {}
            for name, entry in self._entries.items():
                shards.setdefault(entry.shard, {})[name] = entry

            def found(shard: Path) -> dict[str, Any]:
                find = partial(_shard_hashes, shard, shards[shard])
                return dict(remembered([shard], "hashes of a safetensors file", find, memory))

            with ThreadPoolExecutor(_HASH_THREADS) as pool:
                self._hashes = dict(zip(shards, pool.map(found, shards), strict=True))
        return self._hashes

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise UserError(f"{self.path}: no tensor {name!r}{nearest(name, self._entries)}")
        return self._entries[name]

    def _open(self) -> dict[str, _Entry]:
        if (self.path / SINGLE_FILE).exists():
            return _entries(self.path / SINGLE_FILE)
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
        files = sorted(set(weight_map.values()))
        for file in files:
            # Checked as text, because the shards of a hub cache are links that lead out of the folder by design.
            if not is_inside(file):
                raise UserError(f"{index_path}: weight_map names a file outside the folder: {file!r}")
        for file in files:
            shard = self.path / file
            if not shard.exists():
                raise UserError(f"{shard}: missing, and {INDEX_FILE} names it")
            for name, entry in _entries(shard).items():
                if weight_map.get(name) != file:
                    where = f"places it in {weight_map[name]}" if name in weight_map else "does not name it"
                    raise UserError(f"{shard}: holds tensor {name}, but {INDEX_FILE} {where}")
                entries[name] = entry
        for name, file in weight_map.items():
            if name not in entries:
                raise UserError(f"{self.path / file}: does not hold tensor {name}, which {INDEX_FILE} places there")
        return entries


def _entries(shard: Path) -> dict[str, _Entry]:
    return {t.name: _Entry(shard, t.dtype, t.shape, t.start, t.stop) for t in read_header(shard)}


def _bits_hash(entry: _Entry) -> str:
    digest = xxhash.xxh3_128()
    with open_regular(entry.shard) as file:
        file.seek(entry.start)
        for at in range(entry.start, entry.stop, _HASH_CHUNK_BYTES):
            digest.update(file.read(min(_HASH_CHUNK_BYTES, entry.stop - at)))
    return digest.hexdigest()


def _shard_hashes(shard: Path, entries: Mapping[str, _Entry]) -> dict[str, Any]:
    """XXH3-128 of a file, as `file`, and of tensors of it, as `tensors`, from one reading in the order of its bytes."""
    whole, tensors = xxhash.xxh3_128(), {name: xxhash.xxh3_128() for name in entries}
    left = sorted(entries, key=lambda name: entries[name].start, reverse=True)
    buffer, at = bytearray(_HASH_CHUNK_BYTES), 0
    with open_regular(shard) as file:
        while count := file.readinto(buffer):
            block = memoryview(buffer)[:count]
            whole.update(block)
            # The tensor that begins first is the last of `left`. One that goes on in the next block stays there.
            while left and entries[left[-1]].start < at + count:
                entry = entries[left[-1]]
                tensors[left[-1]].update(block[max(entry.start - at, 0) : max(entry.stop - at, 0)])
                if entry.stop > at + count:
                    break
                left.pop()
            at += count
    if any(entry.stop > at for entry in entries.values()):
        raise UserError(f"{shard}: truncated while it was being read")
    return {"file": whole.hexdigest(), "tensors": {name: digest.hexdigest() for name, digest in tensors.items()}}


def functional_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the keys that only say where weights came from and how they are stored."""
    return {key: value for key, value in config.items() if key not in _STORAGE_KEYS}
