"""Boxes: rectangular parts of tensors, as plain numbers."""

from __future__ import annotations

Box = tuple[tuple[int, int], ...]
"""One (start, stop) a dimension."""


def whole(shape: tuple[int, ...]) -> Box:
    """The box that is all of a tensor of this shape."""
    return tuple((0, n) for n in shape)


def slices(box: Box) -> tuple[slice, ...]:
    """A box as an index.

    >>> slices(((0, 2), (3, 5)))
    (slice(0, 2, None), slice(3, 5, None))
    """
    return tuple(slice(start, stop) for start, stop in box)


def volume(box: Box) -> int:
    """Number of elements in a box."""
    count = 1
    for start, stop in box:
        count *= stop - start
    return count
