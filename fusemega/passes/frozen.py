"""A frozen model beside the one in training, in the same layout: opened, built, and run before each step.

It has no optimizer and no gradients, takes no part in checkpoints or exports, and is read from its folder again when a
run resumes. Of each micro-batch the last stage keeps the hidden states of supervised positions, until the step ends.

Shapes: N supervised positions of a micro-batch, G the teacher's hidden size, V this rank's vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fusemega.checkpoint.open_model import ModelConfig, ModelSource
from fusemega.errors import UserError
from fusemega.losses.registry import TeacherOutput
from fusemega.models.build import GPT
from fusemega.passes.forward import Batch, head_settings, run_schedule
from fusemega.runtime.layout import ParallelConfig
from fusemega.runtime.parallel import World


def open_teacher(
    config: ModelConfig, parallel: ParallelConfig, world_size: int, student: ModelSource, key: str = "objective.teacher"
) -> ModelSource:
    """The teacher of `student`, checked; nothing is allocated yet.

    Args:
        key: what names it in the run file.

    Raises:
        UserError: as `ModelSource`; another tokenizer; a smaller vocabulary.
    """
    try:
        source = ModelSource(config, parallel, world_size)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    found, wanted = source.tokenizer.content_hash, student.tokenizer.content_hash
    if found != wanted:
        raise UserError(
            f"{key}: {config.load} has another tokenizer than {student.config.load} ({found[:12]}, {wanted[:12]}); "
            "allowed: a model of the same one"
        )
    if source.vocab_size < student.vocab_size:
        raise UserError(
            f"{key}: {config.load} has a vocabulary of {source.vocab_size}, and {student.config.load} one of "
            f"{student.vocab_size}: its last ids would have no probability; allowed: as many, or more"
        )
    return source


@dataclass(frozen=True)
class OnlineTeacher:
    """What one process holds of it. `weight_VG` is on the last stage: the rows of the student's ids there."""

    gpt: GPT
    world: World
    weight_VG: torch.Tensor | None

    @classmethod
    def build(cls, source: ModelSource, student: GPT, world: World) -> OnlineTeacher:
        """With its weights, in the student's layout. Collective."""
        gpt = source.build(world).requires_grad_(False).eval()
        weight_VG = _same_rows(gpt.head_weight(), student.head_weight(), world) if world.is_last_stage else None
        return cls(gpt, world, weight_VG)

    @torch.no_grad()
    def teach(self, micro_batches: Sequence[Batch]) -> list[Batch]:
        """The micro-batches, with `TeacherOutput` under "teacher" on the last stage. Collective."""

        def keep(hidden_NG: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
            return hidden_NG.new_zeros(()), hidden_NG

        hidden = run_schedule(list(self.gpt.chunks), micro_batches, keep, self.world, forward_only=True)
        if self.weight_VG is None:
            return list(micro_batches)
        softcap = head_settings(self.gpt, self.world).get("softcap")
        return [
            {**batch, "teacher": TeacherOutput(hidden_NG, self.weight_VG, softcap)}
            for batch, hidden_NG in zip(micro_batches, hidden, strict=True)
        ]


def _same_rows(weight_VG: torch.Tensor, student_VH: torch.Tensor, world: World) -> torch.Tensor:
    """The teacher's head, cut over the tensor-parallel ranks as the student's is. Collective over them."""
    rows = len(student_VH)
    if world.tp_size == 1 or len(weight_VG) == rows:
        return weight_VG.detach()[:rows]
    parts = [torch.empty_like(weight_VG) for _ in range(world.tp_size)]
    dist.all_gather(parts, weight_VG.detach(), group=world.tp_group)
    return torch.cat(parts)[world.tp_rank * rows :][:rows].clone()
