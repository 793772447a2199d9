"""The head of ArmoRM (Wang et al., 2024, arXiv:2406.12845): objectives, weighed by a network that sees the prompt.

    objectives = W h_last                                  the score of each objective
    weights    = softmax(MLP(h_gate) / temperature) * logit_scale
    score      = sum(weights * (objectives @ M))

h_last is the final hidden state of the last token, as for any score. h_gate is that of the first token of the last
header that opens an assistant's turn, so it depends on the prompt alone. In config.json the architecture is
LlamaForRewardModelWithGating, whose code lies in the model's folder; this is the same model without that code.

Shape suffixes: S sequences, H hidden size, M objectives (O in the other index of a matrix).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fusemega.models.family import HFConfig, require_int, require_number
from fusemega.models.rules import Replicated, Rule

# Llama-3's header before an answer. Its first token's hidden state goes into the weights.
GATE_TEXT = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
_DEFAULTS = {"num_objectives": 19, "gating_hidden_dim": 1024, "gating_n_hidden": 3, "gating_temperature": 10}
GATING_KEYS = frozenset(_DEFAULTS)
_LARGEST_TEMPERATURE = 1e6


@dataclass(frozen=True)
class Gating:
    """What config.json says of such a head.

    Attributes:
        objectives: M.
        hidden: units of each hidden layer of the MLP.
        layers: hidden layers of the MLP.
        temperature: divides what the MLP gives.
    """

    objectives: int
    hidden: int
    layers: int
    temperature: float

    @classmethod
    def of(cls, hf_config: HFConfig) -> Gating:
        """Read from a configuration; absent keys have the values of ArmoRM-Llama3-8B-v0.1.

        Raises:
            UserError: a key is not a positive number.
        """
        require_number(hf_config, "gating_temperature", below=_LARGEST_TEMPERATURE)

        def size(key: str) -> int:
            return require_int(hf_config, key, _DEFAULTS[key])

        temperature = float(hf_config.get("gating_temperature") or _DEFAULTS["gating_temperature"])
        return cls(size("num_objectives"), size("gating_hidden_dim"), size("gating_n_hidden"), temperature)

    def widths(self, hidden_size: int) -> list[int]:
        """The sizes between the MLP's layers, input and output included."""
        return [hidden_size, *[self.hidden] * self.layers, self.objectives]

    def rules(self, hidden_size: int) -> list[Rule]:
        """One rule a parameter. Each is whole on every tensor-parallel rank of the last stage."""
        shapes: dict[str, tuple[int, ...]] = {
            "regression_layer.weight": (self.objectives, hidden_size),
            "reward_transform_matrix": (self.objectives, self.objectives),
            "gating.logit_scale": (1,),
        }
        widths = self.widths(hidden_size)
        for number, (inside, outside) in enumerate(zip(widths, widths[1:], strict=False)):
            shapes[f"gating.layers.{number}.weight"] = (outside, inside)
            shapes[f"gating.layers.{number}.bias"] = (outside,)
        return [Replicated(f"score.{name}", name, shape) for name, shape in shapes.items()]


class GateNetwork(torch.nn.Module):
    """The MLP whose softmax weighs the objectives."""

    def __init__(self, gating: Gating, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        widths = gating.widths(hidden_size)
        layers = [torch.nn.Linear(i, o, dtype=dtype) for i, o in zip(widths, widths[1:], strict=False)]
        self.layers = torch.nn.ModuleList(layers)
        self.logit_scale = torch.nn.Parameter(torch.empty(1, dtype=dtype))
        self._temperature = gating.temperature

    def forward(self, gate_SH: torch.Tensor) -> torch.Tensor:
        """The objectives' weights [S, M], in the dtype of `gate_SH`."""
        x = gate_SH
        for number, layer in enumerate(self.layers):
            x = F.relu(x) if number else x
            assert isinstance(layer, torch.nn.Linear)
            x = F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
        return (x / self._temperature).softmax(dim=1) * self.logit_scale.to(x.dtype)


class GatedHead(torch.nn.Module):
    """The head, whole on every tensor-parallel rank. It is for scoring: it passes no gradient to the model's body."""

    def __init__(self, gating: Gating, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        count = gating.objectives
        self.regression_layer = torch.nn.Linear(hidden_size, count, bias=False, dtype=dtype)
        self.reward_transform_matrix = torch.nn.Parameter(torch.empty(count, count, dtype=dtype))
        self.gating = GateNetwork(gating, hidden_size, dtype)

    @property
    def weight(self) -> torch.Tensor:
        """[M, H], which gives the objectives."""
        return self.regression_layer.weight

    def forward(self, last_SH: torch.Tensor, gate_SH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(score [S], objectives [S, M]) in fp32 (or wider).

        Args:
            last_SH, gate_SH: final hidden states of each sequence's last token, and of its gate token.
        """
        wide = torch.promote_types(last_SH.dtype, torch.float32)
        last_SH, gate_SH = (states.detach().to(wide) for states in (last_SH, gate_SH))
        objectives_SM = last_SH @ self.weight.to(wide).T
        weights_SM = self.gating(gate_SH)
        return (weights_SM * (objectives_SM @ self.reward_transform_matrix.to(wide))).sum(dim=1), objectives_SM
