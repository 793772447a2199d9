"""The oracle of `fused_divergence_loss`: whole logits of both models, definitions as they stand, plain autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_divergence(name: str, p_TV: Tensor, q_TV: Tensor) -> Tensor:
    """[T], from probabilities."""

    def kl(a_TV: Tensor, b_TV: Tensor) -> Tensor:
        return torch.where(a_TV > 0, a_TV * (a_TV.log() - b_TV.log()), 0.0).sum(1)

    if name == "forward_kl":
        return kl(p_TV, q_TV)
    if name == "reverse_kl":
        return kl(q_TV, p_TV)
    middle_TV = (p_TV + q_TV) / 2
    return kl(p_TV, middle_TV) / 2 + kl(q_TV, middle_TV) / 2


def dense_logits(hidden_TH: Tensor, weight_VH: Tensor, softcap: float | None = None) -> Tensor:
    logits_TV = hidden_TH @ weight_VH.t()
    return logits_TV if softcap is None else softcap * torch.tanh(logits_TV / softcap)


def dense_sums(
    logits_TV: Tensor, teacher_TV: Tensor, labels_T: Tensor, name: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """Sums over the tokens of the labels' cross-entropy and of the divergence at `temperature`."""
    ce = torch.nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum")
    p_TV, q_TV = (teacher_TV / temperature).softmax(1), (logits_TV / temperature).softmax(1)
    return ce, dense_divergence(name, p_TV, q_TV).sum()
