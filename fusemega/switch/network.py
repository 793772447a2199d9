"""The switcher: a small network from a prompt's hidden state to the two modes' pass rates.

    s = sigmoid(a * MLP((x - mean) / std) + b)      one s, a and b for each mode
    loss = sum over modes of (s - y)^2 + margin_weight * ((s_long - s_short) - (y_long - y_short))^2, mean over prompts
    the long mode is chosen where s_long - s_short >= threshold

Shape suffixes: N prompts, H features, M modes (short, long).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fusemega.switch.families import MODES


class SwitcherNetwork(nn.Module):
    """See the module.

    Args:
        size: H.
        hidden_sizes: of the hidden layers.
        dropout: after each hidden layer, in training.

    Attributes:
        mean_H, std_H: what the features are standardised with; 0 and 1 until they are set.
        scale_M, shift_M: a and b, the calibration; 1 and 0 until they are set.
    """

    mean_H: Tensor
    std_H: Tensor
    scale_M: Tensor
    shift_M: Tensor

    def __init__(self, size: int, hidden_sizes: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = size
        for after in hidden_sizes:
            layers += [nn.Linear(before, after), nn.GELU(), nn.Dropout(dropout)]
            before = after
        self.layers = nn.Sequential(*layers, nn.Linear(before, len(MODES)))
        self.register_buffer("mean_H", torch.zeros(size))
        self.register_buffer("std_H", torch.ones(size))
        self.register_buffer("scale_M", torch.ones(len(MODES)))
        self.register_buffer("shift_M", torch.zeros(len(MODES)))

    def standardize(self, features_NH: Tensor) -> None:
        """Takes mean and standard deviation of these features; a feature that never varies is left as it is."""
        std_H = features_NH.std(0, correction=0)
        self.mean_H.copy_(features_NH.mean(0))
        self.std_H.copy_(torch.where(std_H > 1e-6, std_H, torch.ones_like(std_H)))

    def logits(self, features_NH: Tensor) -> Tensor:
        """[N, M], before the calibration."""
        found: Tensor = self.layers((features_NH - self.mean_H) / self.std_H)
        return found

    def forward(self, features_NH: Tensor) -> Tensor:
        """[N, M]: the expected pass rates of the two modes."""
        return torch.sigmoid(self.scale_M * self.logits(features_NH) + self.shift_M)


def switch_loss(scores_NM: Tensor, rates_NM: Tensor, margin_weight: float) -> Tensor:
    """The loss, mean over prompts.

    >>> float(switch_loss(torch.tensor([[0.5, 0.5]]), torch.tensor([[0.0, 1.0]]), 1.0))
    1.5
    """
    squares_N = (scores_NM - rates_NM).square().sum(1)
    margin_N = (scores_NM[:, 1] - scores_NM[:, 0]) - (rates_NM[:, 1] - rates_NM[:, 0])
    return (squares_N + margin_weight * margin_N.square()).mean()


def fit_calibration(logits_NM: Tensor, rates_NM: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift of each mode's logit that make the cross-entropy with the pass rates smallest (Platt's scaling).

    Args:
        logits_NM, rates_NM: of prompts that the network was not trained on.

    Returns:
        scale and shift [M], float64. The scale is positive, so that the order of a mode's scores stays; and it is
        pulled gently towards 1 and 0, so that few prompts, or pass rates that the scores separate perfectly, move it
        little.
    """
    logits_NM, rates_NM = logits_NM.double(), rates_NM.double()
    log_scale_M = torch.zeros(logits_NM.size(1), dtype=torch.float64, requires_grad=True)
    shift_M = torch.zeros(logits_NM.size(1), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_scale_M, shift_M], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        found = log_scale_M.exp() * logits_NM + shift_M
        loss = nn.functional.binary_cross_entropy_with_logits(found, rates_NM, reduction="sum") / len(rates_NM)
        loss = loss + (log_scale_M.square().sum() + shift_M.square().sum()) / len(rates_NM)
        loss.backward()
        return loss

    optimizer.step(closure)
    return log_scale_M.detach().exp(), shift_M.detach()


def calibration_error(scores_N: Tensor, rates_N: Tensor, bins: int = 10) -> float:
    """Expected calibration error: mean distance of score and pass rate over bins of equal numbers of prompts.

    >>> calibration_error(torch.tensor([0.25, 0.5]), torch.tensor([0.0, 1.0]), bins=1)
    0.125
    """
    parts = torch.tensor_split(scores_N.double().argsort(), min(bins, len(scores_N)))
    distances = [
        (scores_N[part].double().mean() - rates_N[part].double().mean()).abs() * len(part)
        for part in parts
        if len(part)
    ]
    return float(sum(distances, torch.zeros((), dtype=torch.float64))) / len(scores_N)
