"""Contiguous layers whose removal turns the stream least, at the last token of each sequence.

PruneMe (Gromov et al., arXiv:2403.17887): d(l, l + n) = arccos(cos(X_l, X_{l+n})) / pi at the last token, averaged over
sequences; the n layers after the l with the smallest d are removed. Ties: the first l.

Shape suffixes: S sequences, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F


def angular_distance(before_SH: torch.Tensor, after_SH: torch.Tensor) -> float:
    """The mean angle over sequences, in units of pi."""
    cosine_S = F.cosine_similarity(before_SH.double(), after_SH.double(), dim=1).clamp(-1, 1)
    return float(torch.arccos(cosine_S).mean()) / math.pi


def contiguous_layers(states: Mapping[int, torch.Tensor], count: int) -> list[int]:
    """The `count` layers to remove, the last one first: what is left in between is then always one gap.

    Args:
        states: layer -> [S, H], what it reads; and under the number of layers, what the last one gives.
        count: at most the number of layers.
    """
    number = len(states) - 1
    starts = range(number - count + 1)
    start = min(starts, key=lambda layer: angular_distance(states[layer], states[layer + count]))
    return [start + i for i in reversed(range(count))]
