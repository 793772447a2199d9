"""Sums over whole tensors that do not depend on how the tensor is cut into blocks.

Each cell of `CELL` consecutive elements is summed in the block's precision. The sums of the cells are then added
exactly (`math.fsum`), so their order does not matter. Blocks begin at multiples of `CELL`.

Shape suffixes: n elements of one block, flat.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

CELL = 1 << 14


def cell_sums(values_n: torch.Tensor) -> list[float]:
    """The sum of each cell of a block; the last cell of a tensor may be shorter."""
    whole = len(values_n) // CELL * CELL
    sums = values_n[:whole].view(-1, CELL).sum(dim=1).tolist() if whole else []
    if whole < len(values_n):
        sums.append(values_n[whole:].sum().item())
    return sums


def totals(parts: Iterable[list[list[float]]]) -> list[float]:
    """The exact total of each model, from the results of a pass: for each block, a list with `cell_sums` of each model.

    >>> totals([[[1.0, 2.0], [10.0]], [[3.0], [20.0]]])  # two blocks, two models
    [6.0, 30.0]
    """
    return [math.fsum(cell for cells in column for cell in cells) for column in zip(*parts, strict=True)]


def shares(amounts: list[float]) -> list[float]:
    """Amounts divided by their sum; equal shares if all are zero.

    >>> shares([1.0, 3.0]), shares([0.0, 0.0])
    ([0.25, 0.75], [0.5, 0.5])
    """
    total = math.fsum(amounts)
    return [amount / total for amount in amounts] if total > 0 else [1 / len(amounts)] * len(amounts)
