"""One micro-batch through a Megatron model, up to the rows of hidden states that a loss asks for.

Shapes: T tokens of the packed row, N positions whose next token is supervised, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from fusemega.models.build import GPT
from fusemega.runtime.parallel import World

Batch = dict[str, Any]
# (hidden_NH, batch) -> (scalar loss, what the schedule collects for this micro-batch)
LossFunction = Callable[[torch.Tensor, Batch], tuple[torch.Tensor, Any]]


def supervised_hidden(hidden_S1H: torch.Tensor, positions_N: torch.Tensor, world: World) -> torch.Tensor:
    """Rows of the last stage's output that predict supervised tokens, [N, H], the same on each TP rank.

    Backward sums the TP ranks' partial gradients (reduce-scatters them under sequence parallelism), as the
    vocabulary kernel expects. Rows are picked first, so only they travel, except under sequence parallelism.
    """
    if world.sequence_parallel:
        hidden_S1H = gather_from_sequence_parallel_region(
            hidden_S1H, tensor_parallel_output_grad=True, group=world.tp_group
        )
        return hidden_S1H[positions_N, 0]
    return copy_to_tensor_model_parallel_region(hidden_S1H[positions_N, 0], group=world.tp_group)


def run_schedule(
    model: torch.nn.Module,
    micro_batches: Sequence[Batch],
    loss_function: LossFunction,
    world: World,
    *,
    forward_only: bool,
) -> list[Any]:
    """Megatron's schedule over one step's micro-batches.

    Args:
        model: this rank's stage (bare or under DistributedDataParallel).
        micro_batches: this data-parallel rank's micro-batches, in order; at least one; all of the same T where
            there are several pipeline stages.
        loss_function: called on the last stage.
        forward_only: no backward.

    Returns:
        What `loss_function` collected, a list over micro-batches; empty except on the last stage.
    """

    def forward_step(batches: Iterator[Batch], stage: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        batch = next(batches)
        output = stage(batch["tokens"], batch["position_ids"], None, packed_seq_params=_packed(batch))

        def loss(hidden_S1H: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
            value, collected = loss_function(supervised_hidden(hidden_S1H, batch["positions"], world), batch)
            # The middle value is Megatron's token count; ours are in the loss already.
            return value, torch.zeros((), dtype=torch.int, device=world.device), collected

        return output, loss

    collected: list[Any] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(micro_batches),
        model=model,
        num_microbatches=len(micro_batches),
        seq_length=micro_batches[0]["tokens"].size(1),
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return collected


def head_settings(gpt: GPT, world: World) -> dict[str, Any]:
    """What the vocabulary kernel must know besides hidden states and weight."""
    return {"group": world.tp_group, "vocab_size": gpt.vocab_size}


def total_over_ranks(collected: Sequence[torch.Tensor], size: int, world: World) -> torch.Tensor:
    """fp64 [size]: the sum of what `run_schedule` collected on all ranks, on every rank. Collective."""
    total = torch.zeros(size, dtype=torch.float64, device=world.device)
    for values in collected:
        total += values
    dist.all_reduce(total, group=world.dp_group)
    dist.all_reduce(total, group=world.pp_group)  # only the last stage has anything to add
    return total


def _packed(batch: Batch) -> PackedSeqParams:
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch["cu_seqlens"],
        cu_seqlens_kv=batch["cu_seqlens"],
        max_seqlen_q=batch["max_seqlen"],
        max_seqlen_kv=batch["max_seqlen"],
    )
