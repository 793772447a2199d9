"""Reads blocks of the tensors of several models, for the methods.

Shape suffixes: n elements of one block, flat.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fusemega.errors import UserError
from fusemega.hf.ranges import RangeReader


@dataclass(frozen=True)
class TensorSource:
    """Where one model keeps one output tensor.

    Attributes:
        reader: reader of its folder.
        name: the tensor's name there.
        dtype: the tensor's dtype there.
        rows: its row for each row of the output, -1 where it has none; None: the same rows.
        width: elements of a row (only used with `rows`).
    """

    reader: RangeReader
    name: str
    dtype: torch.dtype
    rows: np.ndarray | None = None
    width: int = 1

    def load(self, start: int, count: int) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """Output elements `start` to `start + count` in this model's dtype, and the parts (from, to) of them that it
        lacks, where the values are undefined."""
        out_n = torch.empty(count, dtype=self.dtype)
        missing = []
        for begin, end, own in self._runs(start, count):
            if own is None:
                missing.append((begin, end))
            else:
                self.reader.read(self.name, own, out_n[begin:end])
        return out_n, missing

    def _runs(self, start: int, count: int) -> Iterator[tuple[int, int, int | None]]:
        """(from, to) in the block, and the first own element: one for each stretch that lies together in the file."""
        if self.rows is None:
            yield 0, count, start
            return
        first, last = start // self.width, (start + count - 1) // self.width
        rows = self.rows[first : last + 1]
        absent = rows < 0
        # A new stretch begins where rows begin or cease to be absent, or where a row does not follow the one before.
        breaks = np.where(absent[:-1] | absent[1:], absent[:-1] != absent[1:], np.diff(rows) != 1)
        edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(rows)]
        for left, right in zip(edges[:-1], edges[1:], strict=True):
            begin = max((first + left) * self.width, start)
            end = min((first + right) * self.width, start + count)
            own = int(rows[left])
            offset = begin - (first + left) * self.width
            yield begin - start, end - start, None if own < 0 else own * self.width + offset


def load_block(
    sources: Sequence[TensorSource], start: int, count: int, dtype: torch.dtype, has_base: bool
) -> list[torch.Tensor]:
    """Output elements `start` to `start + count` of every model, the base (if there is one) first, as they are stored.

    A model that lacks a row gets the base's row, or, if there is no base or it lacks the row too, the mean of the
    models that have it. In a block with such rows, all are widened to `dtype`.
    """
    loaded = [source.load(start, count) for source in sources]
    out, missing = [values for values, _ in loaded], [parts for _, parts in loaded]
    if not any(missing):
        return out
    out = [values.to(dtype) for values in out]
    # Between two neighbouring edges the same models lack their rows.
    edges = sorted({edge for parts in missing for part in parts for edge in part})
    for left, right in zip(edges[:-1], edges[1:], strict=True):
        lacks = [any(begin <= left and right <= end for begin, end in parts) for parts in missing]
        owners = [values[left:right] for values, lacking in zip(out, lacks, strict=True) if not lacking]
        if not any(lacks):
            continue
        fill = owners[0] if has_base and not lacks[0] else torch.stack(owners).sum(0).div_(len(owners))
        for values, lacking in zip(out, lacks, strict=True):
            if lacking:
                values[left:right] = fill
    return out


def check_finite(sources: Sequence[TensorSource], values: Sequence[torch.Tensor], start: int) -> None:
    """Refuses NaN and infinities, naming the folder, the tensor and the first place.

    Raises:
        UserError: there is one.
    """
    for source, block in zip(sources, values, strict=True):
        if torch.isfinite(block.sum()):  # one pass, and wrong only for finite values whose sum is not
            continue
        bad = torch.nonzero(~torch.isfinite(block))
        if len(bad):
            place = int(bad[0])
            raise UserError(
                f"{source.reader.folder.path}: tensor {source.name} holds {block[place].item()} at element "
                f"{start + place} of the merged tensor; nothing can be merged with it"
            )
