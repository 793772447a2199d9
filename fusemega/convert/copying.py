"""The work of a conversion's processes: gather the bytes of a plan's tensors block by block, and write or compare them.

A process holds two blocks, whatever the size of the tensors. Files are read into these blocks, not mapped, because
mapped pages would count as memory of this process. numpy is imported only if rows are cut, and torch only if dtypes
change.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash

from fusemega.errors import UserError
from fusemega.files.moves import ITEM_BYTES, Assembled, Item, Move, Stored

BLOCK_BYTES = 1 << 20  # stays in a core's cache between reading, hashing and writing
Tap = Callable[[Stored, int, memoryview], None]
"""(tensor, first byte in it, bytes): called with everything that is read."""


class Reader:
    """Open source files, a buffer for a block, and one for rows that must be cut or converted."""

    def __init__(self, tap: Tap | None = None) -> None:
        self._tap = tap
        self._files: dict[str, int] = {}
        self._block = bytearray()
        self._spare = bytearray()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def blocks(self, tensor: Assembled) -> Iterator[memoryview]:
        """The tensor's bytes in row-major order. Gaps between moves are 0.

        A reader has one block: what it yields is overwritten by its next, of this tensor or of another.
        """
        row_bytes = _row_bytes(tensor.shape, tensor.dtype)
        rows_each = max(1, BLOCK_BYTES // row_bytes)
        buffer = self._block = _at_least(self._block, min(rows_each, tensor.shape[0]) * row_bytes)
        gaps = not tensor.complete
        for first in range(0, tensor.shape[0], rows_each):
            last = min(first + rows_each, tensor.shape[0])
            block = memoryview(buffer)[: (last - first) * row_bytes]
            moves = [move for move in tensor.moves if move.target_box[0][0] < last and move.target_box[0][1] > first]
            if gaps:  # the buffer still holds the block before
                block[:] = bytes(len(block))
            for move in moves:
                start, stop = max(first, move.target_box[0][0]), min(last, move.target_box[0][1])
                source_row = move.source_box[0][0] + start - move.target_box[0][0]
                if _whole_rows(move, tensor):
                    target = block[(start - first) * row_bytes : (stop - first) * row_bytes]
                    self._read(move.source, source_row * row_bytes, target)
                else:
                    self._read_cut(move, source_row, tensor, block, (start - first, stop - first))
            yield block

    def _read(self, source: Stored, at: int, into: memoryview) -> None:
        try:
            if source.path not in self._files:
                self._files[source.path] = os.open(source.path, os.O_RDONLY)
            done = 0
            while done < len(into):
                count = os.preadv(self._files[source.path], [into[done:]], source.offset + at + done)
                if count == 0:
                    raise UserError(f"{source.path}: truncated inside tensor {source.name}")
                done += count
        except OSError as error:
            raise UserError(f"{source.path}: cannot read tensor {source.name}: {error.strerror}") from None
        if self._tap is not None:
            self._tap(source, at, into)

    def _read_cut(
        self, move: Move, source_row: int, tensor: Assembled, block: memoryview, target_rows: tuple[int, int]
    ) -> None:
        """Rows of which only a part is wanted, or of another type: read whole, then cut, then converted."""
        import numpy as np

        source = move.source
        row_bytes = _row_bytes(source.shape, source.dtype)
        rows = target_rows[1] - target_rows[0]
        rows_each = max(1, BLOCK_BYTES // row_bytes)
        self._spare = _at_least(self._spare, min(rows, rows_each) * row_bytes)
        target = np.frombuffer(block, dtype=_unsigned(tensor.dtype)).reshape(-1, *tensor.shape[1:])
        target_inner = tuple(slice(*span) for span in move.target_box[1:])
        source_inner = tuple(slice(*span) for span in move.source_box[1:])
        for at in range(0, rows, rows_each):
            count = min(rows_each, rows - at)
            raw = memoryview(self._spare)[: count * row_bytes]
            self._read(source, (source_row + at) * row_bytes, raw)
            values = np.frombuffer(raw, dtype=_unsigned(source.dtype)).reshape(count, *source.shape[1:])
            cut = values[(slice(None), *source_inner)]
            here = slice(target_rows[0] + at, target_rows[0] + at + count)
            target[(here, *target_inner)] = cut if source.dtype == tensor.dtype else _convert(cut, source, tensor)


def _at_least(buffer: bytearray, size: int) -> bytearray:
    """The buffer, or a larger one: fresh memory costs more than the copy into it."""
    return buffer if len(buffer) >= size else bytearray(size)


def _convert(values: object, source: Stored, target: Assembled) -> object:
    """Converts to the target's type with torch's rounding; numpy sees both sides as unsigned integers."""
    import numpy as np
    import torch

    from fusemega.hf.narrowing import narrowed

    bits = torch.from_numpy(np.ascontiguousarray(values).view(np.uint8))
    converted = narrowed(bits.view(getattr(torch, source.dtype)), getattr(torch, target.dtype), target.name)
    return converted.view(torch.uint8).numpy().view(_unsigned(target.dtype))


def _unsigned(dtype: str) -> str:
    return f"u{ITEM_BYTES[dtype]}"


def _row_bytes(shape: tuple[int, ...], dtype: str) -> int:
    count = ITEM_BYTES[dtype]
    for size in shape[1:]:
        count *= size
    return count


def _whole_rows(move: Move, tensor: Assembled) -> bool:
    whole = tuple((0, size) for size in tensor.shape[1:])
    same = move.source.shape[1:] == tensor.shape[1:] and move.source.dtype == tensor.dtype
    return same and move.source_box[1:] == whole and move.target_box[1:] == whole


class _Digests:
    """XXH3-128 of each tensor that is read from its first byte to its last, in order."""

    def __init__(self) -> None:
        self._hashes: dict[Stored, xxhash.xxh3_128] = {}
        self._next: dict[Stored, int] = {}

    def __call__(self, source: Stored, at: int, data: memoryview) -> None:
        if self._next.setdefault(source, 0) == at:
            self._hashes.setdefault(source, xxhash.xxh3_128()).update(data)
            self._next[source] += len(data)

    def finished(self) -> dict[str, str]:
        """By tensor name; a tensor that was read in another order, or in part, is left out."""
        return {
            source.name: digest.hexdigest()
            for source, digest in self._hashes.items()
            if self._next[source] == source.nbytes
        }


@dataclass(frozen=True)
class Written:
    """What `write_item` reports.

    Attributes:
        item: its name.
        hash: XXH3-128 of the bytes written.
        digests: XXH3-128 of each source tensor that was read whole.
    """

    item: str
    hash: str
    digests: dict[str, str]


def write_item(root: str, sources: bool, item: Item) -> Written:
    """Write an item into its file below `root`, on disk before the function returns. The file may exist already.

    Without `sources`, what is read is not hashed, only what is written.
    """
    path = Path(root, item.file)
    digests = _Digests()
    written = xxhash.xxh3_128()
    # Opened without O_TRUNC: other items of the same file may be there already.
    with (
        Reader(digests if sources else None) as reader,
        open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb", buffering=0) as file,
        ThreadPoolExecutor(1) as flusher,
    ):
        file.seek(item.offset)
        flushing = flusher.submit(os.fdatasync, file.fileno())

        def put(data: bytes | memoryview) -> None:
            nonlocal flushing
            written.update(data)
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
            # The disk takes what is there while the next blocks are read, rather than everything at the end.
            if flushing.done():
                flushing.result()  # a full disk is reported once
                flushing = flusher.submit(os.fdatasync, file.fileno())

        for part in item.parts:
            put(part.head)
            if part.tensor is not None:
                for block in reader.blocks(part.tensor):
                    put(block)
            put(part.tail)
        flushing.result()
        os.fsync(file.fileno())
    return Written(item.name, written.hexdigest(), digests.finished())


def item_is(root: str, journaled: tuple[Item, str]) -> bool:
    """Whether the bytes of an item below `root` still have the XXH3-128 that `write_item` reported of them."""
    item, expected = journaled
    digest = xxhash.xxh3_128()
    left = item.nbytes
    try:
        with open(Path(root, item.file), "rb") as file:
            file.seek(item.offset)
            while left and (block := file.read(min(left, BLOCK_BYTES))):
                digest.update(block)
                left -= len(block)
    except OSError:
        return False
    return not left and digest.hexdigest() == expected


def same_bits(pair: tuple[Assembled, Assembled]) -> bool:
    """Whether two tensors of one shape and type hold the same bits, also in NaNs and signed zeros."""
    with Reader() as ours, Reader() as theirs:  # two, because a reader has one block
        return all(a == b for a, b in zip(ours.blocks(pair[0]), theirs.blocks(pair[1]), strict=True))
