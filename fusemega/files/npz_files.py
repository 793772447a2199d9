"""Reads arrays from `.npz` files from any source: only the expected arrays, of the expected types, within a limit.

numpy allocates what a header says before it reads a byte, and a kilobyte can unpack to gigabytes. So sizes are checked
in the archive's directory before anything is unpacked, and no more than that is read.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fusemega.files.opening import open_regular

ARRAY_BYTES = 1 << 30


class MalformedArraysError(ValueError):
    """The file is no such archive, or has other arrays than expected. The message does not name the file."""


def read_arrays(path: str | Path, dtypes: Mapping[str, str], what: str = "") -> dict[str, np.ndarray]:
    """One-dimensional arrays by name; others in the file are left unread.

    Args:
        dtypes: type of each array by its name, as numpy spells types: {"table": "<i4"}.
        what: as in `open_regular`.

    Raises:
        UserError: the file cannot be opened.
        MalformedArraysError: no such archive, or other arrays than expected.
    """
    with open_regular(path, what) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return {name: _read(archive, f"{name}.npy", np.dtype(dtype)) for name, dtype in dtypes.items()}
        except MalformedArraysError:
            raise
        except Exception as error:  # zipfile and its decompressors raise a dozen exception types for invalid archives
            raise MalformedArraysError(f"{type(error).__name__}: {error}") from None


def _read(archive: zipfile.ZipFile, name: str, dtype: np.dtype[Any]) -> np.ndarray:
    size = archive.getinfo(name).file_size
    if size > ARRAY_BYTES:
        raise MalformedArraysError(f"{name} has {size} bytes; allowed: {ARRAY_BYTES}")
    with archive.open(name) as packed:
        content = packed.read(size + 1)  # to the end, so that its checksum is compared
    header = io.BytesIO(content)
    if np.lib.format.read_magic(header) != (1, 0):
        raise MalformedArraysError(f"{name} is of another version of the format")
    shape, _, found = np.lib.format.read_array_header_1_0(header, max_header_size=1000)
    if found != dtype or len(shape) != 1:
        raise MalformedArraysError(f"{name} has the type {found} and {len(shape)} dimensions; expected {dtype} and 1")
    if math.prod(shape) * dtype.itemsize != len(content) - header.tell() or shape[0] < 0:
        raise MalformedArraysError(f"{name} has {len(content)} bytes, and its header says {shape[0]} elements")
    return np.frombuffer(content, dtype, offset=header.tell()).copy()
