"""A model's answer for a micro-batch: its final hidden states with the head that reads them, or a number a sequence.

Shape suffixes: N supervised positions of a micro-batch, S sequences, H the model's hidden size, V this rank's rows of
its output weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

Wants = Literal["hidden", "logp"]
"""What an objective asks of a model: `HiddenStates`, or each sequence's log-probability, summed over its supervised
tokens."""


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """The inputs of the vocabulary kernel.

    Attributes:
        hidden_NH: final hidden states at the supervised positions.
        weight_VH: this rank's rows of the output weight; a frozen model's are split like the trained model's.
        head: the kernel's other arguments by name: `group`, `vocab_size`, `softcap`.
    """

    hidden_NH: Tensor
    weight_VH: Tensor
    head: Mapping[str, Any]


Answer = HiddenStates | Tensor
"""What `Wants` asks for. The tensor is [S], of fp32 or wider, the same on every rank that shares the sequences'
tokens."""
