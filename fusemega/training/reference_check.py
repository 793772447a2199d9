"""Before the first update: is the model in training the reference, as a preference loss assumes?

At the first update the policy is the reference, so both give each sequence the same log-probability. Where they do not,
the store is of another model, or was taught with another template or precision, and every reward would be wrong without
any sign of it. So the first global batch is scored with the model that training starts from, and compared.

Shape suffixes: S sequences of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fusemega.errors import UserError
from fusemega.losses.reference import Reference
from fusemega.passes.forward import hidden_states, run_schedule, sequence_log_probs
from fusemega.passes.frozen import ask_all
from fusemega.passes.micro_batch import MicroBatch
from fusemega.runtime.console import phase
from fusemega.training.optimizer import complete_parameters
from fusemega.training.trainer import Trainer

LARGEST_FP32, MEAN_BF16 = 1e-4, 2e-2
"""The allowed relative difference: of any sequence, or, if one of both models computes in bf16, on average."""
_NAMED = 8


@dataclass(frozen=True)
class _Compared:
    """One sequence: its row of data, and its log-probability by the model in training and by the reference."""

    source: str
    policy: float
    reference: float

    @property
    def difference(self) -> float:
        """Relative; of log-probabilities nearer to 0 than 1, absolute."""
        return abs(self.policy - self.reference) / max(abs(self.reference), 1.0)


def check_reference(trainer: Trainer) -> None:
    """Compares the model in training with the objective's reference on the first global batch. Collective.

    Does nothing without a reference, with `same_model: false`, and in a run that resumes, whose model has changed.

    Raises:
        UserError: they differ by more than rounding; names the rows, on every rank.
    """
    reference = trainer.objective.reference
    if reference is None or not reference.settings.same_model or trainer.iteration > 0:
        return
    complete_parameters(trainer.ddp)
    with phase("the model is compared with the reference on the first global batch"):
        compared = _compare(trainer, reference)
    compared.sort(key=lambda each: -each.difference)
    in_job = reference.settings.in_job
    in_bf16 = "bf16" in (trainer.run.model.dtype, None if in_job is None else in_job.dtype)
    mean = sum(each.difference for each in compared) / len(compared)
    # Written so that a difference that is not a number is refused, too.
    if mean <= MEAN_BF16 if in_bf16 else all(each.difference <= LARGEST_FP32 for each in compared):
        return
    found = f"{mean:.2g} on average, allowed {MEAN_BF16} in bf16" if in_bf16 else f"allowed {LARGEST_FP32} in fp32"
    rows = ", ".join(f"{each.source} ({each.policy:.6g}, reference {each.reference:.6g})" for each in compared[:_NAMED])
    raise UserError(
        f"{reference.where}: the model in training does not give the first global batch the reference's "
        f"log-probabilities (relative difference {found}): {rows}; take the reference from {trainer.run.model.load} in "
        f"{trainer.run.model.dtype} with the same chat template, or, if training starts from another model than the "
        f"reference, set {reference.where}.same_model: false"
    )


@torch.no_grad()
def _compare(trainer: Trainer, reference: Reference) -> list[_Compared]:
    """Every sequence of the first global batch, on every rank. Collective."""
    world = trainer.world
    trainer.gpt.eval()
    batches = trainer.data.step(0).on(world.device).micro_batches
    # Only the plain sums are compared.
    asked = ask_all(trainer.frozen, [replace(batch, token_weights=None) for batch in batches])

    def logp(hidden_NH: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        policy_S = sequence_log_probs(hidden_states(trainer.gpt, hidden_NH, world), batch, world)
        return hidden_NH.new_zeros(()), torch.stack([policy_S.double(), reference.logp(batch).double()])

    found: Sequence[torch.Tensor] = run_schedule(list(trainer.gpt.chunks), asked, logp, world, forward_only=True)
    mine: list[_Compared] = []
    # Tensor- and context-parallel ranks have the same numbers.
    if world.tp_rank == 0 and world.cp_rank == 0:
        for batch, values in zip(asked, found, strict=False):  # only the last stage found something
            mine += [_Compared(*each) for each in zip(batch.sources, *values.tolist(), strict=True)]
    return [each for part in world.from_all(mine) for each in part]
