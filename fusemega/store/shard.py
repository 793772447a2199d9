"""One shard of a store: a file of columns, checked, memory-mapped, written whole or not at all.

Layout: 8 bytes magic; 8 bytes length of the header (little-endian); the header, JSON: {"columns": [{name, dtype, shape,
offset, crc32}], "size"}; then the columns, each at a multiple of 64 bytes. All little-endian.

Shapes: R rows of the shard, S supervised positions of all its rows, P of one row, K log-probs a position.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusemega.errors import UserError

_MAGIC = b"FMSTORE1"
_ALIGN = 64
KEY_BYTES, HASH_BYTES = 16, 8
# Columns with one entry a row, read when a store is opened...
_INDEX = {"keys": "|u1", "begins": "<i8"}
# ...and those read with the shard's first row.
_DATA = {
    "ids_hash": "|u1",
    "num_bytes": "<i8",
    "sum_logp": "<f8",
    "end_bytes": "<i4",
    "ids": "<i4",
    # fp16 moves a log-prob l by at most |l| / 2048, hence a row's mass by at most its entropy / 2048, which is at most
    # log(K + 1) / 2048: 1.2e-3 for K = 10, and a fifth of that on usual rows.
    "logp": "<f2",
    "log_residual": "<f2",
}


@dataclass(frozen=True)
class Row:
    """What a scorer says about the P supervised tokens of one sample, in order; position t predicts token t + 1.

    Attributes:
        ids_hash: 8 bytes, `Sample.ids_hash` of the scorer's own ids.
        end_bytes: int32 [P], where position t ends in the canonical stream (-1: nowhere comparable).
        ids_PK: int32, the K most probable next tokens, ids of the scorer's vocabulary.
        logp_PK: float32 (fp16 on disk), their log-probs at the manifest's temperature.
        log_residual_P: float32 (fp16 on disk), log of the mass of all other tokens, at that temperature.
        sum_logp: summed log-prob of the supervised tokens themselves, at temperature 1, in nats.
        num_bytes: UTF-8 bytes of the supervised tokens.
    """

    ids_hash: bytes
    end_bytes: np.ndarray
    ids_PK: np.ndarray
    logp_PK: np.ndarray
    log_residual_P: np.ndarray
    sum_logp: float
    num_bytes: int

    @property
    def num_tokens(self) -> int:
        """P."""
        return len(self.end_bytes)

    @property
    def mean_logp(self) -> float:
        """`sum_logp` a token, in nats."""
        return self.sum_logp / self.num_tokens

    @property
    def cross_entropy(self) -> float:
        """-`mean_logp`: nats a token of the scorer's own tokenizer, at temperature 1."""
        return -self.mean_logp


def write_shard(path: Path, keys: Sequence[bytes], rows: Sequence[Row]) -> None:
    """Writes `path` under a temporary name, syncs, renames; on any failure nothing is left.

    Raises:
        UserError: no space left, or any other failure to write, naming the path.
    """
    columns = _columns(keys, rows)
    entries, offset = [], 0
    for name, array in columns.items():
        entries.append(
            {
                "name": name,
                "dtype": array.dtype.str,
                "shape": list(array.shape),
                "offset": offset,
                "crc32": zlib.crc32(array.data),
            }
        )
        offset += -(-array.nbytes // _ALIGN) * _ALIGN
    text = json.dumps({"columns": entries, "size": offset}).encode()
    text += b" " * (-(len(text) + 16) % _ALIGN)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(_MAGIC + len(text).to_bytes(8, "little") + text)
            for array in columns.values():
                file.write(array.tobytes())
                file.write(bytes(-array.nbytes % _ALIGN))
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError as error:
        raise UserError(f"{path}: cannot write the shard: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)


class Shard:
    """An open shard. `keys`: uint8 [R, 16]. Opening reads the header and the index only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                start = file.read(16)
                length = int.from_bytes(start[8:], "little")
                size = os.fstat(file.fileno()).st_size
                if start[:8] != _MAGIC or length > size:
                    raise UserError(f"{path}: not a shard of a sample store, or its beginning is damaged")
                header = json.loads(file.read(length))
            self._columns: Mapping[str, dict] = {entry["name"]: entry for entry in header["columns"]}
            expected = 16 + length + header["size"]
        except OSError as error:
            raise UserError(f"{path}: cannot read the shard: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: damaged shard header") from None
        if size != expected:
            raise UserError(f"{path}: truncated shard: {size} bytes, {expected} expected")
        self._origin = 16 + length
        index = self._read(_INDEX)
        self.keys, self._begins = np.array(index["keys"]), np.array(index["begins"])
        self._data: dict[str, np.ndarray] | None = None

    def row(self, r: int) -> Row:
        """Row `r` of the shard; the first call checks the whole file."""
        if self._data is None:
            self._data = self._read(_DATA)
        data, here = self._data, slice(int(self._begins[r]), int(self._begins[r + 1]))
        return Row(
            ids_hash=data["ids_hash"][r].tobytes(),
            end_bytes=np.array(data["end_bytes"][here]),
            ids_PK=np.array(data["ids"][here]),
            logp_PK=data["logp"][here].astype(np.float32),
            log_residual_P=data["log_residual"][here].astype(np.float32),
            sum_logp=float(data["sum_logp"][r]),
            num_bytes=int(data["num_bytes"][r]),
        )

    def _read(self, names: Mapping[str, str]) -> dict[str, np.ndarray]:
        """Views of the named columns, each checked against its checksum."""
        arrays = {}
        file = np.memmap(self.path, dtype=np.uint8, mode="r").view(np.ndarray)
        for name, dtype in names.items():
            entry = self._columns.get(name)
            if entry is None or entry["dtype"] != dtype:
                raise UserError(f"{self.path}: damaged shard: column {name} is missing or of another type")
            try:
                begin = self._origin + entry["offset"]
                column = file[begin : begin + math.prod(entry["shape"]) * np.dtype(dtype).itemsize]
                if zlib.crc32(column.data) != entry["crc32"]:
                    raise UserError(f"{self.path}: damaged shard: checksum of {name} does not match")
                arrays[name] = column.view(dtype).reshape(entry["shape"])
            except (KeyError, TypeError, ValueError):
                raise UserError(f"{self.path}: damaged shard: its header on column {name}") from None
        return arrays


def _columns(keys: Sequence[bytes], rows: Sequence[Row]) -> dict[str, np.ndarray]:
    begins = np.concatenate(([0], np.cumsum([row.num_tokens for row in rows])))
    values = {
        "keys": np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES),
        "begins": begins,
        "ids_hash": np.frombuffer(b"".join(row.ids_hash for row in rows), dtype=np.uint8).reshape(-1, HASH_BYTES),
        "num_bytes": np.array([row.num_bytes for row in rows]),
        "sum_logp": np.array([row.sum_logp for row in rows]),
        "end_bytes": np.concatenate([row.end_bytes for row in rows]),
        "ids": np.concatenate([row.ids_PK for row in rows]),
        "logp": np.concatenate([row.logp_PK for row in rows]),
        "log_residual": np.concatenate([row.log_residual_P for row in rows]),
    }
    return {name: np.ascontiguousarray(values[name], dtype=dtype) for name, dtype in {**_INDEX, **_DATA}.items()}
