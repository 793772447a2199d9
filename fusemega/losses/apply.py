"""An objective applied to what a model gives: one micro-batch's part of the loss.

Shape suffixes: N supervised positions of a micro-batch, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fusemega.losses.registry import Objective
from fusemega.models.build import GPT
from fusemega.passes.forward import hidden_states, sequence_log_probs
from fusemega.passes.micro_batch import MicroBatch
from fusemega.runtime.parallel import World


def objective_loss(
    objective: Objective[Any],
    gpt: GPT,
    hidden_NH: torch.Tensor,
    batch: MicroBatch,
    denominators: Mapping[str, torch.Tensor | float],
    world: World,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A micro-batch's part of the loss, and of each term's sum: see `Objective.loss`. Only on the last stage.

    Of unit sequence or group, collective over context parallelism: each of its ranks gets the whole value.
    """
    states = hidden_states(gpt, hidden_NH, world)
    output = states if objective.unit == "token" else sequence_log_probs(states, batch, world)
    return objective.loss(output, batch, denominators)
