"""Sums over whole tensors that do not depend on how the tensor is cut into blocks.

A sum is taken over cells of `CELL` consecutive elements, in the block's precision, and the cells are added exactly
(`math.fsum`), so their order does not matter either. Blocks begin at multiples of `CELL`.
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
    """From the results of a pass, each a list of `cell_sums`, the exact total of each position of that list."""
    return [math.fsum(cell for cells in column for cell in cells) for column in zip(*parts, strict=True)]


def shares(amounts: list[float]) -> list[float]:
    """Amounts divided by their sum; equal shares where all are zero."""
    total = math.fsum(amounts)
    return [amount / total for amount in amounts] if total > 0 else [1 / len(amounts)] * len(amounts)
