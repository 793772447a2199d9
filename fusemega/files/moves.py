"""The plan of a conversion: stored tensors as places in files, and new tensors as boxes of them. Reads no weights.

Everything here is small, plain and can be pickled. torch is not imported, so that the processes that copy stay small.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from fusemega.files.boxes import Box, volume, whole

ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of an element, for the data types that weights are stored in, by torch's names."""


@dataclass(frozen=True)
class Stored:
    """A dense, row-major tensor in a file, starting at byte `offset`."""

    name: str
    path: str
    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Move:
    """`target[target_box] = source[source_box]`, two boxes of one shape."""

    source: Stored
    source_box: Box
    target_box: Box


@dataclass(frozen=True)
class Assembled:
    """A tensor made of boxes of stored ones, in `dtype`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    moves: tuple[Move, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def complete(self) -> bool:
        """Whether the moves, which never overlap, reach every element."""
        return sum(volume(move.target_box) for move in self.moves) == math.prod(self.shape)


def as_is(stored: Stored) -> Assembled:
    """A stored tensor as it is."""
    return Assembled(stored.name, stored.shape, stored.dtype, (Move(stored, whole(stored.shape), whole(stored.shape)),))


def window(moves: Iterable[Move], box: Box, at: tuple[int, ...]) -> list[Move]:
    """The parts of `moves` that fall into `box`, as moves into another tensor, in which the box begins at element `at`.

    This cuts a tensor (`at` = 0) or puts one together (`at` = where the part belongs). So rules can be applied to the
    chunks that another layout has written.
    """
    out = []
    for move in moves:
        common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, move.target_box, strict=True)]
        if any(start >= stop for start, stop in common):
            continue
        # s and t: where the move's source and target boxes begin in this dimension.
        source_box = tuple(
            (s + start - t, s + stop - t)
            for (s, _), (t, _), (start, stop) in zip(move.source_box, move.target_box, common, strict=True)
        )
        target_box = tuple(
            (origin + start - first, origin + stop - first)
            for origin, (first, _), (start, stop) in zip(at, box, common, strict=True)
        )
        out.append(Move(move.source, source_box, target_box))
    return out


@dataclass(frozen=True)
class FilePart:
    """Consecutive bytes of an output file: fixed ones, then a tensor's, then fixed ones."""

    head: bytes = b""
    tensor: Assembled | None = None
    tail: bytes = b""

    @property
    def nbytes(self) -> int:
        return len(self.head) + (self.tensor.nbytes if self.tensor else 0) + len(self.tail)


@dataclass(frozen=True)
class Item:
    """The unit of work, of progress and of resumption: consecutive parts of one output file.

    Attributes:
        file: path relative to the output folder.
        offset: where in the file the parts begin.
        parts: what is written there, in order.
    """

    file: str
    offset: int
    parts: tuple[FilePart, ...]

    @property
    def name(self) -> str:
        return f"{self.file}@{self.offset}"

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)
