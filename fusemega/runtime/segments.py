"""The segments of a packed row, known on the host.

Every layer needs the bounds of the samples in its row. They are in `cu_seqlens`, a tensor on the device, and to read it
the host must wait for all queued work. So the code that builds a row keeps its bounds, and `known` connects them with
the tensor that Megatron passes from layer to layer. Only a row without known bounds is read, once.

A segment may continue another one: the responses to a shared prompt attend to it as if each had it in front.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import groupby, pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fusemega.runtime.context_parallel import zigzag
from fusemega.runtime.device import sent

_ATTRIBUTE = "fusemega_segments"

Prefix = tuple[int, int]
"""The tokens [start, end) of a row that come before a segment in its text: of the segment that begins at `start`, up to
its padding."""
NO_PREFIX: Prefix = (0, 0)
Kept = TypeVar("Kept")


class SegmentRun(NamedTuple):
    """Neighbouring segments of one length that continue the same one, or none.

    Attributes:
        length, number: tokens of each, and how many there are.
        prompt: number of the run that is the segment they continue; None for none.
        seen: tokens of it that they see.
    """

    length: int
    number: int
    prompt: int | None
    seen: int


class Segments:
    """Where the segments of one row are, and which of them continue others.

    Args:
        bounds: of the whole row, as in cu_seqlens: the first is 0, the last the row's length.
        prefixes: of each segment; left out: no segment continues another.
        texts: tokens of the text that each segment ends, with what it continues and without padding; left out: all.

    Example:
        >>> Segments([0, 4, 6, 8, 9], [(0, 0), (0, 4), (0, 4), (0, 0)]).runs
        [SegmentRun(length=4, number=1, prompt=None, seen=0), SegmentRun(length=2, number=2, prompt=0, seen=4), \
SegmentRun(length=1, number=1, prompt=None, seen=0)]
    """

    def __init__(self, bounds: Sequence[int], prefixes: Sequence[Prefix] = (), texts: Sequence[int] = ()) -> None:
        self.bounds = tuple(bounds)
        self.prefixes = tuple(prefixes) or (NO_PREFIX,) * (len(self.bounds) - 1)
        self.texts = list(texts) or [a + b for a, b in zip(self.before, self.lengths, strict=True)]
        self._kept: dict[object, object] = {}

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each segment."""
        return [end - start for start, end in pairwise(self.bounds)]

    @cached_property
    def before(self) -> list[int]:
        """Tokens that come before each segment in its text: the position of its first token."""
        return [end - start for start, end in self.prefixes]

    @property
    def has_prefixes(self) -> bool:
        """Whether any segment continues another."""
        return any(self.before)

    @cached_property
    def runs(self) -> list[SegmentRun]:
        """The segments, in order. A segment that others continue is a run of its own."""
        prompts = {start for start, end in self.prefixes if end > start}
        segments = zip(self.lengths, self.prefixes, self.bounds, strict=False)
        keys = [(length, prefix, start if start in prompts else None) for length, prefix, start in segments]
        runs: list[SegmentRun] = []
        numbers: dict[int, int] = {}  # where a segment that others continue begins -> its run
        for (length, (first, end), start), run in groupby(keys):
            if start is not None:
                numbers[start] = len(runs)
            runs.append(SegmentRun(length, len(list(run)), numbers[first] if end > first else None, end - first))
        return runs

    def kept(self, key: object, make: Callable[[], Kept]) -> Kept:
        """What `make` gives, made once for this row."""
        if key not in self._kept:
            self._kept[key] = make()
        found: Kept = self._kept[key]  # type: ignore[assignment]
        return found

    def zigzag_order(self, size: int, device: torch.device) -> Tensor:
        """int64 [T] on `device`: the places in the row of the tokens of context-parallel rank 0, then 1, ..."""

        def make() -> Tensor:
            bounds = torch.tensor(self.bounds, dtype=torch.int32, device="cpu")
            return sent(torch.cat([zigzag(bounds, rank, size) for rank in range(size)]), device)

        return self.kept(("zigzag", size, device), make)


def known(
    cu_seqlens: Tensor, bounds: Sequence[int], prefixes: Sequence[Prefix] = (), texts: Sequence[int] = ()
) -> Tensor:
    """Gives `cu_seqlens` its bounds, so that its values need not be read from now on. Returns it.

    Args:
        cu_seqlens: int32 [segments + 1], on any device.
        bounds: the same numbers.
        prefixes, texts: as `Segments` takes them.
    """
    if not hasattr(cu_seqlens, _ATTRIBUTE):
        setattr(cu_seqlens, _ATTRIBUTE, Segments(bounds, prefixes, texts))
    return cu_seqlens


def segments_of(cu_seqlens: Tensor) -> Segments:
    """The segments of a row. Without a call of `known` they are read from the device, the first time."""
    if not hasattr(cu_seqlens, _ATTRIBUTE):
        known(cu_seqlens, cu_seqlens.tolist())
    found: Segments = getattr(cu_seqlens, _ATTRIBUTE)
    return found
