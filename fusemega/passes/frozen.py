"""Frozen models beside the one in training, in the same layout: opened, built, and asked before each step.

They have no optimizer and no gradients, take no part in checkpoints or exports, and are read from their folders again
when a run resumes. For each micro-batch the last stage keeps the answer until the step ends: hidden states of
supervised positions, or one number a sequence.

Shape suffixes: N supervised positions of a micro-batch, S sequences, H the frozen model's hidden size, V this rank's
rows of an output weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from fusemega.checkpoint.open_model import ModelConfig, ModelSource
from fusemega.errors import UserError
from fusemega.models.build import GPT
from fusemega.passes.answers import Answer, HiddenStates, Wants
from fusemega.passes.forward import head_settings, run_schedule, sequence_log_probs
from fusemega.passes.micro_batch import MicroBatch
from fusemega.runtime.layout import ParallelConfig
from fusemega.runtime.parallel import World


@dataclass(frozen=True)
class Request:
    """A frozen model that an objective asks.

    Attributes:
        model: which model; with the tokenizer of the model in training, and its vocabulary or a larger one.
        wants: what the objective asks of it.
    """

    model: ModelConfig
    wants: Wants


def open_frozen(
    config: ModelConfig, parallel: ParallelConfig, world_size: int, trained: ModelSource, key: str
) -> ModelSource:
    """A frozen model beside `trained`, checked; nothing is allocated yet.

    Args:
        key: its key in the run file, for messages.

    Raises:
        UserError: as `ModelSource`; another tokenizer; a smaller vocabulary.
    """
    try:
        source = ModelSource(config, parallel, world_size)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    found, wanted = source.tokenizer.content_hash, trained.tokenizer.content_hash
    if found != wanted:
        raise UserError(
            f"{key}: {config.load} has another tokenizer than {trained.config.load} ({found[:12]}, {wanted[:12]}); "
            "allowed: a model of the same one"
        )
    if source.vocab_size < trained.vocab_size:
        raise UserError(
            f"{key}: {config.load} has a vocabulary of {source.vocab_size}, and {trained.config.load} one of "
            f"{trained.vocab_size}: its last ids would have no probability; allowed: as many, or more"
        )
    return source


@dataclass(frozen=True)
class FrozenModel:
    """What one process holds of a frozen model.

    Attributes:
        wants: what is asked of it.
        weight_VH: on the last stage: its output weight's rows for the ids that the trained model has on this rank.
        vocab_size: the trained model's. Rows beyond it stand for no token and are left out.
    """

    gpt: GPT
    world: World
    wants: Wants
    weight_VH: torch.Tensor | None
    vocab_size: int

    @classmethod
    def build(cls, source: ModelSource, wants: Wants, trained: GPT, world: World) -> FrozenModel:
        """Builds the model with its weights, in the layout of `trained`. Collective."""
        gpt = source.build(world).requires_grad_(False).eval()
        weight_VH = _same_rows(gpt.head.weight, trained.head.weight, world) if world.is_last_stage else None
        return cls(gpt, world, wants, weight_VH, trained.vocab_size)

    @torch.no_grad()
    def ask(self, micro_batches: Sequence[MicroBatch]) -> list[Answer]:
        """The model's answer for each micro-batch; empty except on the last stage. Collective."""

        def keep(hidden_NH: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, Answer]:
            assert self.weight_VH is not None
            head = {**head_settings(self.gpt, self.world), "vocab_size": self.vocab_size}
            states = HiddenStates(hidden_NH, self.weight_VH, head)
            kept = states if self.wants == "hidden" else sequence_log_probs(states, batch, self.world)
            return hidden_NH.new_zeros(()), kept

        return run_schedule(list(self.gpt.chunks), micro_batches, keep, self.world, forward_only=True)


def ask_all(models: Mapping[str, FrozenModel], micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """The micro-batches; on the last stage, with each model's answer in their `answers`. Collective."""
    asked = list(micro_batches)
    for name, model in models.items():
        answers = model.ask(micro_batches)
        if answers:
            asked = [
                replace(batch, answers={**batch.answers, name: answer})
                for batch, answer in zip(asked, answers, strict=True)
            ]
    return asked


def _same_rows(weight_VH: torch.Tensor, trained_VH: torch.Tensor, world: World) -> torch.Tensor:
    """The frozen model's head, split over the tensor-parallel ranks like the trained one's. Collective over them."""
    rows = len(trained_VH)
    if world.tp_size == 1 or len(weight_VH) == rows:
        return weight_VH.detach()[:rows]
    parts = [torch.empty_like(weight_VH) for _ in range(world.tp_size)]
    dist.all_gather(parts, weight_VH.detach(), group=world.tp_group)
    # A copy: a slice would keep the gathered weight of all ranks in memory.
    return torch.cat(parts)[world.tp_rank * rows :][:rows].clone()
