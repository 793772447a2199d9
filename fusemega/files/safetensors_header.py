"""Reads the header of a safetensors file: its tensors and where they lie. Reads no weights."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusemega.errors import UserError
from fusemega.files.json_files import MalformedError, parse_json
from fusemega.files.opening import open_regular

HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_DIMENSIONS = 16
_FILE_BYTES = 1 << 60
# Bits of an element. For other types the size is not checked: code that reads such a tensor refuses its type.
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8}
_BITS |= {"U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file.

    Attributes:
        dtype: as safetensors spells it, such as BF16.
        start, stop: bytes from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> list[Tensor]:
    """The tensors of a file in the order of their bytes, which fill the file without a gap.

    Raises:
        UserError: it cannot be read, its header is malformed, or its size and header disagree.
    """
    with open_regular(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            header_bytes = int.from_bytes(file.read(8), "little")
            if size < 8 or header_bytes > min(size - 8, HEADER_BYTES):
                raise UserError(f"{path}: truncated, or not a safetensors file ({size} bytes)")
            header = parse_json(file.read(header_bytes))
        except OSError as error:
            raise UserError(f"{path}: cannot read: {error.strerror}") from None
        except MalformedError as error:
            raise UserError(f"{path}: not a safetensors file: its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: corrupt header: not in the safetensors format")
    header.pop("__metadata__", None)  # the format's only key that is not a tensor
    tensors = [_tensor(path, name, info, 8 + header_bytes) for name, info in header.items()]
    at = 8 + header_bytes
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.stop)):
        if tensor.start != at:
            raise _misfit(path, tensor.name)
        at = tensor.stop
    if size != at:
        state = "truncated" if size < at else "too long"
        raise UserError(f"{path}: {state}: {size} bytes, and its header says {at}")
    return sorted(tensors, key=lambda tensor: (tensor.start, tensor.stop))


def _tensor(path: Path, name: str, info: Any, origin: int) -> Tensor:
    given = info if isinstance(info, dict) else {}
    dtype, shape, place = given.get("dtype"), given.get("shape", ""), given.get("data_offsets", "")
    if not isinstance(dtype, str) or not _sizes(shape) or not _sizes(place) or len(place) != 2:
        raise UserError(f"{path}: corrupt header: not in the safetensors format (tensor {name})")
    start, stop = place
    bits = math.prod(shape) * _BITS.get(dtype, 0)
    if stop < start or bits > 8 * _FILE_BYTES or (dtype in _BITS and 8 * (stop - start) != bits):
        raise _misfit(path, name)
    return Tensor(name, dtype, tuple(shape), origin + start, origin + stop)


def _sizes(value: Any) -> bool:
    """Whether it is a list of whole numbers that can be sizes."""
    return (
        isinstance(value, list)
        and len(value) <= _DIMENSIONS
        and all(type(size) is int and 0 <= size < _FILE_BYTES for size in value)
    )


def _misfit(path: Path, name: str) -> UserError:
    return UserError(f"{path}: corrupt header: tensor {name} does not fill its place in the file")
