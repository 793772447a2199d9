"""What a model says of a micro-batch: its final hidden states with the head that reads them, or a number a sequence.

Shape suffixes: N supervised positions of a micro-batch, S sequences, H the model's hidden size, V this rank's rows of
its output weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

Wants = Literal["hidden", "logp"]
"""What is asked of a model: `HiddenStates`, or each sequence's log-probability, summed over its supervised tokens."""


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """What the vocabulary kernel reads.

    Attributes:
        hidden_NH: final hidden states at the supervised positions.
        weight_VH: this rank's rows of the output weight; a frozen model's are cut as those of the model in training.
        head: what else the kernel takes, by name: `group`, `vocab_size`, `softcap`.
    """

    hidden_NH: Tensor
    weight_VH: Tensor
    head: Mapping[str, Any]


Answer = HiddenStates | Tensor
"""As `Wants` says; the tensor is [S], of fp32 or wider, the same on every rank that shares the sequences' tokens."""
