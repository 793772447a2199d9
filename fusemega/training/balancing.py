"""The loss that balances experts, as a term of a step's loss: what it is divided by, and its value.

It is the mean over the step's segments (samples) and over the model's layers with experts, of what
`runtime/experts.Balance` gives for one of each, times a coefficient. A segment is whole in one micro-batch, so value
and gradient are the same in every layout and for every micro-batch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from fusemega.errors import UserError
from fusemega.models.architecture import Architecture
from fusemega.models.build import GPT
from fusemega.models.parts import Experts
from fusemega.passes.micro_batch import MicroBatch
from fusemega.runtime.experts import Balance, balance_of
from fusemega.runtime.parallel import World
from fusemega.training.run_file import TrainRun

TERM = "load balancing"
_KEY = "training.router_aux_loss_coef"


def coefficient(run: TrainRun, architecture: Architecture) -> float:
    """What the run file says, or else the model's configuration; 0: the loss has no such term.

    Raises:
        UserError: the model has no experts; responses share their prompt.
    """
    given = run.training.router_aux_loss_coef
    found = architecture.family.balancing(architecture.hf_config) if given is None else given
    if given and not layers_with_experts(architecture):
        raise UserError(f"{_KEY}: {given:g}, and {run.model.load} has no experts; allowed: 0, or leave it out")
    if found and run.training.share_prefix:
        raise UserError(
            f"training.share_prefix: the loss that balances experts would count a prompt once ({_KEY} is {found:g}); "
            f"allowed: false, or {_KEY}: 0"
        )
    return found


def layers_with_experts(architecture: Architecture) -> int:
    """How many layers have experts."""
    return sum(isinstance(layer.mlp, Experts) for layer in architecture.layers)


@dataclass
class Balancing:
    """Of a model in training.

    Attributes:
        coefficient: of the term.
        balance: what the model's routers share.
    """

    coefficient: float
    balance: Balance
    world: World
    layers: int
    _count: torch.Tensor = field(init=False, repr=False)

    @classmethod
    def of(cls, run: TrainRun, gpt: GPT, world: World) -> Balancing | None:
        """None: the loss has no such term."""
        found = coefficient(run, gpt.architecture)
        return cls(found, balance_of(gpt), world, layers_with_experts(gpt.architecture)) if found else None

    def begin(self, micro_batches: Sequence[MicroBatch]) -> None:
        """A step begins. Collective.

        Args:
            micro_batches: this data-parallel rank's.
        """
        mine = sum(_segments(batch) for batch in micro_batches) * self.layers
        # Filled on the device, rather than copied there, for which the host would wait.
        count = torch.full((), mine, dtype=torch.float64, device=self.world.device)
        dist.all_reduce(count, group=self.world.dp_group)
        self._count = count.clamp(min=1)
        self.balance.begin((self.coefficient / self._count).float())

    def mean(self) -> torch.Tensor:
        """fp64 []: the term's value over the step, without its coefficient. Collective; the same on every rank."""
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        if self.balance.total is not None:
            total += self.balance.total
        dist.all_reduce(total)  # every token of every layer is on one rank
        return total / self._count


def _segments(batch: MicroBatch) -> int:
    """Segments of the whole row that have tokens of their own; the others are padding."""
    before = (end - start for start, end in batch.prefixes)
    return sum(text > shared for text, shared in zip(batch.texts, before, strict=True))
