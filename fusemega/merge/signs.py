"""Elects a sign for each element, and sums the deltas that have it.

Shape suffixes: n elements of one block, flat.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def elect(total_n: torch.Tensor) -> torch.Tensor:
    """The majority's sign, +1.0 or -1.0, from the sum of what each model wants; a sum of zero counts as +1.0."""
    return torch.ge(total_n, 0, out=torch.empty_like(total_n)).mul_(2).sub_(1)


def agreeing_sums(
    deltas: Sequence[torch.Tensor], weights: Sequence[float], sign_n: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Sums over the models whose weighted delta has the elected sign; a delta of zero has no sign.

    Args:
        deltas: K tensors [n]; they are overwritten.
        weights: K numbers.
        sign_n: from `elect`.

    Returns:
        sum of weight * delta [n], sum of weight [n], and the number of (element, model) pairs that agree.
    """
    numerator, denominator = torch.zeros_like(sign_n), torch.zeros_like(sign_n)
    agrees = torch.empty_like(sign_n)
    pairs = 0.0
    for delta, weight in zip(deltas, weights, strict=True):
        if weight == 0:
            continue
        delta.mul_(sign_n)  # now has the sign of the weight where it agrees
        (torch.gt if weight > 0 else torch.lt)(delta, 0, out=agrees)
        pairs += agrees.sum().item()
        numerator.addcmul_(delta, agrees, value=weight)
        denominator.add_(agrees, alpha=weight)
    return numerator.mul_(sign_n), denominator, pairs


def ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """numerator / denominator, where a denominator of zero counts as 1; in the memory of both."""
    empty = torch.eq(denominator, 0, out=torch.empty_like(denominator))
    return numerator.div_(denominator.add_(empty))
