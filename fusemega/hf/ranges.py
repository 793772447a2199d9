"""Reads and writes ranges of elements of tensors in model folders, for computations that do not load the models.

Reading is `pread` into a buffer that the caller owns, not a memory map: the pages of a map count as memory of this
process, and a map of five models would count as five models. Processes and threads may read and write at once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from fusemega.errors import UserError
from fusemega.hf.folder import HFFolder
from fusemega.hf.safetensors_writer import TensorInfo, file_header, raw_bytes

_BLOCK_BYTES = 1 << 20


class RangeReader:
    """Reads flat element ranges of a folder's tensors."""

    def __init__(self, folder: HFFolder) -> None:
        self.folder = folder
        self._descriptors: dict[str, int] = {}
        self._places: dict[str, tuple[int, int]] = {}
        self._opening = threading.Lock()

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Reads elements `start` to `start + len(out)` of a tensor, row-major, into `out`, which has its dtype.

        Raises:
            UserError: the file cannot be read, or has become shorter than it was.
        """
        view = out.view(torch.uint8).numpy().data
        try:
            descriptor, at = self._places.get(name) or self._open(name)
            at += start * out.element_size()
            while view:
                count = os.preadv(descriptor, [view], at)
                if count == 0:
                    path = self.folder.stored(name).path
                    raise UserError(f"{path}: truncated while it was being read, in tensor {name}")
                view, at = view[count:], at + count
        except OSError as error:
            path = self.folder.stored(name).path
            raise UserError(f"{path}: cannot read tensor {name}: {error.strerror}") from None

    def _open(self, name: str) -> tuple[int, int]:
        """The descriptor of a tensor's file, and where in it the tensor begins."""
        stored = self.folder.stored(name)
        with self._opening:
            if stored.path not in self._descriptors:
                self._descriptors[stored.path] = os.open(stored.path, os.O_RDONLY)
            self._places[name] = self._descriptors[stored.path], stored.offset
        return self._places[name]

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        self._places.clear()


class RangeWriter:
    """The weight files of a new folder, each at its full size from the start, filled in any order.

    Args:
        folder: where the files are; it exists.
        shards: file name -> its tensors in file order, as `plan_shards` gives them.
        resume: the files are there, and what they hold is kept.
    """

    def __init__(self, folder: Path, shards: Mapping[str, list[TensorInfo]], resume: bool = False) -> None:
        self._places: dict[str, tuple[int, int, torch.dtype]] = {}
        self._sizes: dict[str, int] = {}
        self._descriptors: list[int] = []
        for file, tensors in shards.items():
            header = file_header(tensors)
            size = len(header) + sum(info.nbytes for info in tensors)
            descriptor = os.open(folder / file, os.O_RDWR | os.O_CREAT, 0o644)
            self._descriptors.append(descriptor)
            if not resume:
                os.pwrite(descriptor, header, 0)
                os.ftruncate(descriptor, size)
            elif os.pread(descriptor, len(header), 0) != header or os.fstat(descriptor).st_size != size:
                raise UserError(
                    f"{folder / file}: not the file that was being written; delete {folder} and start again"
                )
            at = len(header)
            for info in tensors:
                self._places[info.name] = (descriptor, at, info.dtype)
                self._sizes[info.name] = info.nbytes
                at += info.nbytes

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        """Writes `values`, which have the tensor's dtype, from element `start` of tensor `name` on."""
        descriptor, at, dtype = self._places[name]
        if values.dtype != dtype:
            raise RuntimeError(f"{name}: planned {dtype}, got {values.dtype}")
        view = raw_bytes(values)
        at += start * values.element_size()
        while view:
            count = os.pwrite(descriptor, view, at)
            view, at = view[count:], at + count

    def read(self, name: str) -> Iterator[memoryview]:
        """The bytes that a tensor has so far, in blocks; each block overwrites the one before."""
        descriptor, at, _ = self._places[name]
        left, buffer = self._sizes[name], bytearray(_BLOCK_BYTES)
        while left:
            count = os.preadv(descriptor, [memoryview(buffer)[:left]], at)
            if count == 0:
                return  # the file was cut off: the caller's hash will differ
            yield memoryview(buffer)[:count]
            at, left = at + count, left - count

    def sync(self) -> None:
        """Puts on disk what has been written so far."""
        for descriptor in self._descriptors:
            os.fdatasync(descriptor)

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
