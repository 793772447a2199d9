"""The cross-entropy as BlockPruner's reference code computes it: logits and losses rounded to bf16.

Rounding is of the same size as the differences that a search compares. This is for parity with published orders only.

Shape suffixes: N tokens, C tokens of a chunk, H hidden size, V vocabulary rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_CHUNK = 1024  # tokens whose logits exist at once


def bf16_cross_entropy(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, labels_N: torch.Tensor, softcap: float | None = None
) -> torch.Tensor:
    """Scalar, fp64: the sum over tokens of the cross-entropy in bf16.

    Args:
        hidden_NH: final hidden states.
        weight_VH: the whole head, without padding rows.
        labels_N: int64, the token that follows.
        softcap: the logits become softcap * tanh(logits / softcap).
    """
    total = torch.zeros((), dtype=torch.float64, device=hidden_NH.device)
    weight_VH = weight_VH.bfloat16()
    for hidden_CH, labels_C in zip(hidden_NH.bfloat16().split(_CHUNK), labels_N.split(_CHUNK), strict=True):
        logits_CV = hidden_CH @ weight_VH.T
        if softcap is not None:
            logits_CV = softcap * torch.tanh(logits_CV / softcap)
        total += F.cross_entropy(logits_CV, labels_C, reduction="none").double().sum()
    return total
