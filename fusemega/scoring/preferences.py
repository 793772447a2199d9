"""Held-out groups of responses, scored by an objective: its loss and its metrics, such as the accuracy on pairs.

Shape suffixes: N tokens whose hidden states the objective reads, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict

from fusemega.errors import UserError
from fusemega.losses.apply import objective_loss, rows_read
from fusemega.losses.registry import Objective
from fusemega.models.build import GPT
from fusemega.passes.batches import GlobalBatch, RowShape, compared, global_batch
from fusemega.passes.forward import run_schedule, total_over_ranks
from fusemega.passes.frozen import FrozenModel, ask_all
from fusemega.passes.micro_batch import MicroBatch
from fusemega.passes.prefetch import Prefetch
from fusemega.passes.score import ROWS_PER_PASS
from fusemega.runtime.parallel import World
from fusemega.text.dataset import TokenizedDataset


class GroupEvaluation(BaseModel):
    """What an evaluation of groups found.

    Attributes:
        loss: the objective's.
        groups: how many groups it is the mean over.
        metrics: the objective's statistics, means over the same groups.
    """

    model_config = ConfigDict(frozen=True)

    loss: float
    groups: int
    metrics: dict[str, float]

    @property
    def row(self) -> dict[str, float]:
        """The row of a file of evaluations."""
        return {"loss": self.loss, "groups": self.groups, **self.metrics}

    @property
    def shown(self) -> dict[str, float]:
        """What a log shows, by name."""
        return {"loss validation": self.loss} | {f"{name} validation": value for name, value in self.metrics.items()}

    @property
    def amount(self) -> str:
        """How much was scored, in words."""
        return f"{self.groups} groups"


@torch.no_grad()
def evaluate_groups(
    gpt: GPT,
    dataset: TokenizedDataset,
    shape: RowShape,
    world: World,
    objective: Objective[Any],
    frozen: Mapping[str, FrozenModel] = MappingProxyType({}),
) -> GroupEvaluation:
    """Score every group. Leaves the model in evaluation mode. Collective; every rank gets the result.

    Args:
        objective: of unit group, which has seen this data (`Objective.for_data`); all its terms count groups.
        frozen: the models that it asks.

    Raises:
        UserError: the loss is not finite.
    """
    gpt.eval()
    names = (*objective.terms, *objective.statistics)
    ones: dict[str, torch.Tensor | float] = dict.fromkeys(objective.terms, 1.0)

    def loss(hidden_NH: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        value, sums = objective_loss(objective, gpt, hidden_NH, batch, ones, world)
        return value, torch.stack([value.double(), *(sums[name].double() for name in names)])

    total = torch.zeros(1 + len(names), dtype=torch.float64, device=world.device)
    count = 0
    # Groups of similar length share a pass; rows then pack well.
    lengths = [int(dataset.lengths[dataset.unit(i)].sum()) for i in range(dataset.num_units)]
    ordered = sorted(range(dataset.num_units), key=lambda i: -lengths[i])
    per_pass = ROWS_PER_PASS * shape.micro_batch_size * world.dp_size
    parts = [ordered[start : start + per_pass] for start in range(0, len(ordered), per_pass)]

    def build(number: int) -> GlobalBatch:
        units = [compared(dataset, i, objective) for i in parts[number]]
        return global_batch(dataset, units, objective, shape, world)

    with Prefetch(build, world.device, len(parts)) as batches:
        for number in range(len(parts)):
            found = batches.take(number)
            count += sum(objective.counts(batch)[objective.terms[0]] for batch in found.micro_batches)
            asked = ask_all(frozen, found.on(world.device).micro_batches)
            collected = run_schedule(list(gpt.chunks), asked, loss, world, forward_only=True, rows=rows_read(objective))
            total += total_over_ranks(collected, len(total), world, world.dp_group)
    counted = torch.full((1,), count, dtype=torch.float64, device=world.device)
    dist.all_reduce(counted, group=world.dp_group)
    groups, *read = torch.cat([counted, total]).tolist()
    value, *sums = (each / max(groups, 1) for each in read)
    if not all(map(math.isfinite, read)):
        raise UserError(f"evaluation.data: the loss of objective.name {objective.terms[0]} on it is {value}")
    statistics = dict(zip(objective.statistics, sums[len(objective.terms) :], strict=True))
    return GroupEvaluation(loss=value, groups=int(groups), metrics=statistics)
