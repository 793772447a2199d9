"""Relative magnitude: how large what a block (or layer) adds is, relative to what it gives: ||f(x)|| / ||x + f(x)||.

As BlockPruner's authors compare with it (arXiv:2406.10594), after Samragh et al. (arXiv:2309.03852); the norms are over
the hidden size, and the mean over positions is taken of their ratio.

Shape suffixes: N positions, H hidden size.
"""

from __future__ import annotations

import torch


def relative_magnitude(before_NH: torch.Tensor, after_NH: torch.Tensor) -> torch.Tensor:
    """[N]: 0 where nothing is added."""
    return (after_NH - before_NH).norm(dim=1) / after_NH.norm(dim=1)
