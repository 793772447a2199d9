"""An objective applied to what a model gives: one micro-batch's part of the loss.

Shape suffixes: N tokens whose hidden states the objective reads, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fusemega.losses.registry import Objective
from fusemega.models.build import GPT
from fusemega.passes.forward import hidden_states, last_rows, sequence_log_probs, sequence_scores
from fusemega.passes.micro_batch import MicroBatch
from fusemega.runtime.parallel import World


def rows_read(objective: Objective[Any]) -> Callable[[MicroBatch], torch.Tensor]:
    """Picks the tokens of a row whose hidden states the objective reads; for `run_schedule`."""
    return last_rows if objective.wants == "score" else lambda batch: batch.positions


def objective_loss(
    objective: Objective[Any],
    gpt: GPT,
    hidden_NH: torch.Tensor,
    batch: MicroBatch,
    denominators: Mapping[str, torch.Tensor | float],
    world: World,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A micro-batch's part of the loss, and of each term's sum: see `Objective.loss`. Only on the last stage.

    For an objective of unit sequence or group, collective over context parallelism: each rank gets the whole value.

    Args:
        hidden_NH: hidden states of the tokens that `rows_read` picks.
    """
    if objective.wants == "score":
        return objective.loss(sequence_scores(gpt, hidden_NH, batch, world), batch, denominators)
    states = hidden_states(gpt, hidden_NH, world)
    output = states if objective.unit == "token" else sequence_log_probs(states, batch, world)
    return objective.loss(output, batch, denominators)
