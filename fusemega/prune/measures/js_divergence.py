"""Jensen-Shannon divergence between the next-token distributions of the whole model and of the masked one.

BlockPruner's authors compare their search by perplexity with the same search by this measure (arXiv:2406.10594).

Shape suffixes: N supervised positions of a row, H hidden size.
"""

from __future__ import annotations

import torch

from fusemega.logits.divergence import fused_divergence_loss
from fusemega.models.build import GPT
from fusemega.passes.forward import hidden_states
from fusemega.prune.masked_runs import Cost
from fusemega.prune.stage import CalibrationRow
from fusemega.runtime.parallel import World


def js_divergence(gpt: GPT, world: World) -> Cost:
    """The sum over a row's positions, nats. Each row's first call is of the whole model, and gives 0.

    The whole model's final hidden states are kept: N x H numbers a row, on the last stage.
    """
    dense: dict[int, torch.Tensor] = {}

    def cost(hidden_NH: torch.Tensor, row: CalibrationRow, number: int) -> torch.Tensor:
        if number not in dense:
            dense[number] = hidden_NH
            return torch.zeros((), dtype=torch.float64, device=hidden_NH.device)
        own = hidden_states(gpt, hidden_NH, world)
        head = dict(own.head)
        _, (_, divergence) = fused_divergence_loss(
            *(own.hidden_NH, own.weight_VH, dense[number], own.weight_VH, row.batch.labels, "jsd"),
            label_weight=0.0,
            divergence_weight=1.0,
            teacher_softcap=head["softcap"],
            **head,
        )
        return divergence.double()

    return cost
