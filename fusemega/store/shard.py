"""One shard of a store: a file of rows, checked, memory-mapped, complete or absent.

Layout, all little-endian: a header (`_HEADER`), the index (`INDEX`, one entry for each row), and the encoded rows
(`coding`) one after the other. In a store of `rows: none` the index is all there is, and leaves out what follows from
the rest (`_SUMS`): 40 bytes a sample. Header and index are checked when a shard is opened, a row's own bytes when it is
read; no other bytes are read at that time.

Shape suffixes: R rows of a shard, P positions of a row, K entries of a position.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np

from fusemega.errors import UserError
from fusemega.files.opening import open_regular
from fusemega.files.output import sync
from fusemega.store.coding import coded_bytes, decode
from fusemega.store.manifest import Manifest
from fusemega.store.row import Row

_MAGIC, _OLD_MAGIC = b"FMSTORE2", b"FMSTORE1"
# magic; hash of the manifest; number of rows; bytes of their codes; CRC-32 of the index. A CRC-32 of these follows.
_HEADER, _CHECKSUM = struct.Struct("<8s8sQQI"), struct.Struct("<I")
KEY_BYTES, HASH_BYTES = 16, 8
INDEX = np.dtype(
    [
        ("key", "u1", KEY_BYTES),
        ("begin", "<i8"),  # of the row's codes
        ("positions", "<i4"),
        ("checksum", "<u4"),  # CRC-32 of the row's codes
        ("ids_hash", "u1", HASH_BYTES),
        ("num_bytes", "<i8"),
        ("sum_logp", "<f8"),
        ("num_scored", "<i4"),
    ]
)
_SUMS = np.dtype(
    [("key", "u1", KEY_BYTES), ("ids_hash", "u1", HASH_BYTES)]
    + [("sum_logp", "<f8"), ("positions", "<i4"), ("num_bytes", "<u4")]
)
_MAPPED = 256  # shards mapped at a time: each holds a file descriptor, of which a process may have 1,024


def index_entry(key: bytes, row: Row, codes: bytes) -> np.ndarray:
    """The row's entry of an index, `begin` left 0; [1] of `INDEX`."""
    entry = np.zeros(1, dtype=INDEX)
    entry["key"], entry["ids_hash"] = np.frombuffer(key, np.uint8), np.frombuffer(row.ids_hash, np.uint8)
    entry["positions"], entry["num_bytes"], entry["sum_logp"] = row.num_tokens, row.num_bytes, row.sum_logp
    entry["num_scored"] = row.num_scored or row.num_tokens
    entry["checksum"] = zlib.crc32(codes)
    return entry


def write_shard(path: Path, manifest: Manifest, index: np.ndarray, codes: list[bytes]) -> None:
    """Writes `path` under a temporary name, syncs, renames; on any failure nothing is left.

    Args:
        manifest: manifest of the store to which the shard belongs.
        index: [R] of `INDEX`; `begin` is filled in here.
        codes: codes of the R rows.

    Raises:
        UserError: no space left, or any other failure to write, naming the path.
    """
    index = index.copy()
    index["begin"] = np.cumsum([0, *map(len, codes[:-1])])
    size = sum(map(len, codes))
    stored = index if manifest.rows != "none" else _cast(index, _SUMS)
    header = _HEADER.pack(_MAGIC, manifest.hash, len(index), size, zlib.crc32(stored.tobytes()))
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(header + _CHECKSUM.pack(zlib.crc32(header)) + stored.tobytes())
            file.writelines(codes)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        sync(path.parent)  # the name, too, is on the disk before the writer counts the rows as stored
    except OSError as error:
        raise UserError(f"{path}: cannot write the shard: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)


class Shard:
    """An open shard: header and index are read and checked.

    Attributes:
        path: the file.
        index: [R] of `INDEX`.

    Raises:
        UserError: not a shard of the store with this manifest, or truncated or damaged; names the path.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self._manifest = path, manifest
        try:
            with open_regular(path) as file:
                start = file.read(_HEADER.size + _CHECKSUM.size)
                stat = os.fstat(file.fileno())
                if start[:8] == _OLD_MAGIC:
                    raise UserError(f"{path}: a shard of the store format 1; run `fusemega teach` again")
                if start[:8] != _MAGIC or len(start) < _HEADER.size + _CHECKSUM.size:
                    raise UserError(f"{path}: not a shard of a sample store, or its header is damaged")
                if zlib.crc32(start[: _HEADER.size]) != _CHECKSUM.unpack_from(start, _HEADER.size)[0]:
                    raise UserError(f"{path}: damaged shard: checksum of its header does not match")
                _, owner, rows, size, checksum = _HEADER.unpack_from(start)
                if owner != manifest.hash:
                    raise UserError(
                        f"{path}: a shard of another store, or the manifest was changed after it was written; "
                        "`fusemega store merge` joins stores of one scorer"
                    )
                stored = INDEX if manifest.rows != "none" else _SUMS
                self._origin = len(start) + rows * stored.itemsize
                if stat.st_size != self._origin + size:
                    raise UserError(f"{path}: truncated shard: {stat.st_size} bytes, {self._origin + size} expected")
                index = file.read(rows * stored.itemsize)
        except OSError as error:
            raise UserError(f"{path}: cannot read the shard: {error.strerror or error}") from None
        if zlib.crc32(index) != checksum:
            raise UserError(f"{path}: damaged shard: checksum of its index does not match")
        self.index: np.ndarray = np.frombuffer(index, dtype=stored)
        if manifest.rows == "none":
            self.index = _cast(self.index, INDEX)
            self.index["num_scored"] = self.index["positions"]
        self._ends = np.append(self.index["begin"][1:], size)
        self._check_index(size)
        self._version = (stat.st_ino, stat.st_mtime_ns)

    def _check_index(self, size: int) -> None:
        """Checks that the index makes sense; its checksum only proves that it is what was written."""
        index, begin = self.index, self.index["begin"]
        smallest, largest = coded_bytes(index["positions"].astype(np.int64), self._manifest)
        num_bytes = self._ends - begin
        follows = np.append(0, self._ends[:-1]) == begin
        sound = follows & (index["positions"] > 0) & (num_bytes >= smallest) & (num_bytes <= largest)
        sound &= (index["num_bytes"] >= 0) & (index["num_scored"] > 0) & np.isfinite(index["sum_logp"])
        sound &= self._ends <= size
        if not sound.all():
            r = int(np.argmin(sound))
            entry = dict(zip(INDEX.names or (), index[r].tolist(), strict=True))
            entry = {name: entry[name] for name in ("positions", "num_bytes", "num_scored", "sum_logp")}
            key = index["key"][r].tobytes().hex()
            raise UserError(
                f"{self.path}: damaged shard: the row of sample {key} has impossible values: "
                f"{num_bytes[r]} bytes, {entry}"
            )

    def coded(self, r: int) -> tuple[np.ndarray, bytes]:
        """Row `r` as it is on disk: [1] of `INDEX`, `begin` 0, and its codes. Equal for equal rows.

        Raises:
            UserError: its bytes were changed.
        """
        file = _mapped(self.path, self._version)
        codes = file[self._origin + int(self.index["begin"][r]) : self._origin + int(self._ends[r])]
        if zlib.crc32(codes) != self.index["checksum"][r]:
            key = self.index["key"][r].tobytes().hex()
            raise UserError(f"{self.path}: damaged shard: checksum of the row of sample {key} does not match")
        entry = self.index[r : r + 1].copy()
        entry["begin"] = 0
        return entry, codes

    def row(self, r: int) -> Row:
        """Row `r` of the shard.

        Raises:
            UserError: as `coded`, or its bytes do not encode a row of this store.
        """
        (entry,), codes = self.coded(r)
        scored = int(entry["num_scored"])
        if self._manifest.rows == "none":
            sizes = int(entry["positions"]), float(entry["sum_logp"]), int(entry["num_bytes"])
            return Row.of_sum(entry["ids_hash"].tobytes(), *sizes)
        if self._manifest.rows == "hidden":
            return Row.of_hidden(entry["ids_hash"].tobytes(), np.frombuffer(codes, dtype="<f4"))
        try:
            columns = decode(codes, int(entry["positions"]), self._manifest)
        except ValueError as error:
            key = entry["key"].tobytes().hex()
            raise UserError(f"{self.path}: damaged shard: the row of sample {key}: {error}") from None
        return Row(
            ids_hash=entry["ids_hash"].tobytes(),
            end_bytes=columns.end_bytes,
            ids_PK=columns.ids_PK,
            logp_PK=columns.logp_PK,
            log_residual_P=columns.log_residual_P,
            label_ids_P=columns.label_ids_P,
            label_logp_P=columns.label_logp_P,
            sum_logp=float(entry["sum_logp"]),
            num_bytes=int(entry["num_bytes"]),
            num_scored=None if scored == entry["positions"] else scored,
        )


def _cast(index: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The columns that both have; 0 in others, which is also the CRC-32 of no bytes."""
    cast = np.zeros(len(index), dtype=dtype)
    for name in set(cast.dtype.names or ()) & set(index.dtype.names or ()):
        cast[name] = index[name]
    return cast


@lru_cache(maxsize=_MAPPED)
def _mapped(path: Path, version: tuple[int, int]) -> mmap.mmap:
    """The whole file, mapped; `version` keeps the cache from returning an earlier file of the same name."""
    try:
        with open_regular(path) as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"{path}: cannot read the shard: {error.strerror or error}") from None
