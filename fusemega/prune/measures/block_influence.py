"""Block influence: 1 - the cosine of what a block (or layer) reads and gives.

ShortGPT (Men et al., arXiv:2403.03853): BI_l = 1 - E_t[cos(X_{l,t}, X_{l+1,t})]; the lowest layers are removed at once.

Shape suffixes: N positions, H hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def block_influence(before_NH: torch.Tensor, after_NH: torch.Tensor) -> torch.Tensor:
    """[N]: 0 where the direction stays."""
    return 1 - F.cosine_similarity(before_NH, after_NH, dim=1)
