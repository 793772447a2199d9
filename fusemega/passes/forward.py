"""One micro-batch through a Megatron model, up to the rows of hidden states that a loss asks for.

Shapes: T tokens of the packed row, N positions whose next token is supervised, H hidden size. Under context parallelism
both are this rank's, except where said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from fusemega.logits.vocab import Query, sparse_log_probs
from fusemega.losses.registry import Objective, OnlineObjective, SequenceObjective, TokenObjective
from fusemega.models.build import GPT
from fusemega.runtime.context_parallel import sum_over_context
from fusemega.runtime.parallel import World
from fusemega.runtime.segments import known

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
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[Batch],
    loss_function: LossFunction,
    world: World,
    *,
    forward_only: bool,
) -> list[Any]:
    """Megatron's schedule over one step's micro-batches.

    Args:
        chunks: what this rank holds of the model (bare or under DistributedDataParallel).
        micro_batches: this data-parallel rank's micro-batches, in order; at least one; all of the same T where
            there are several pipeline stages; and as many as the layout's `micro_batch_multiple` asks for.
        loss_function: called on the last stage, micro-batch by micro-batch in order.
        forward_only: no backward.

    Returns:
        What `loss_function` collected, a list over micro-batches; empty except on the last stage.
    """

    def forward_step(batches: Iterator[Batch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        batch = next(batches)
        output = chunk(batch["tokens"], batch["position_ids"], None, packed_seq_params=_packed(batch))

        def loss(hidden_S1H: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
            value, collected = loss_function(supervised_hidden(hidden_S1H, batch["positions"], world), batch)
            # The middle value is Megatron's token count; ours are in the loss already.
            return value, torch.zeros((), dtype=torch.int, device=world.device), collected

        return output, loss

    collected: list[Any] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(micro_batches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(micro_batches),
        seq_length=micro_batches[0]["tokens"].size(1) * world.cp_size,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return collected


def head_settings(gpt: GPT, world: World) -> dict[str, Any]:
    """What the vocabulary kernel must know besides hidden states and weight."""
    return {"group": world.tp_group, "vocab_size": gpt.vocab_size}


def objective_loss(
    objective: Objective,
    gpt: GPT,
    hidden_NH: torch.Tensor,
    batch: Batch,
    denominators: Mapping[str, torch.Tensor | float],
    world: World,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A micro-batch's part of the loss, and of each term's sum: see `TokenObjective.loss`. Only on the last stage.

    For an online objective the batch holds what `OnlineTeacher.teach` adds to it.
    For a sequence objective, collective over context parallelism: each of its ranks gets the whole value.
    """
    if isinstance(objective, TokenObjective):
        return objective.loss(hidden_NH, gpt.head_weight(), batch, denominators, head_settings(gpt, world))
    if isinstance(objective, OnlineObjective):
        teacher, head = batch["teacher"], head_settings(gpt, world)
        return objective.loss(hidden_NH, gpt.head_weight(), teacher, batch, denominators, head)
    assert isinstance(objective, SequenceObjective)
    labels = Query(batch["labels"][:, None])
    logp_N = sparse_log_probs(hidden_NH, gpt.head_weight(), labels, **head_settings(gpt, world)).logp_TK[:, 0]
    logp_S = logp_N.new_zeros(len(batch["sequence_tokens"])).index_add(0, batch["sequences"], logp_N)
    if world.cp_size > 1:
        logp_S = sum_over_context(logp_S, world.cp_group)
    return objective.loss(logp_S, batch, denominators)


def total_over_ranks(
    collected: Sequence[torch.Tensor], size: int, world: World, group: dist.ProcessGroup
) -> torch.Tensor:
    """fp64 [size]: the sum of what `run_schedule` collected, on every rank. Collective.

    Args:
        group: the ranks whose values add up: `world.dp_cp_group` for sums over tokens, `world.dp_group` for sums over
            sequences, which every context-parallel rank has whole.
    """
    total = torch.zeros(size, dtype=torch.float64, device=world.device)
    for values in collected:
        total += values
    dist.all_reduce(total, group=group)
    dist.all_reduce(total, group=world.pp_group)  # only the last stage has anything to add
    return total


def whole_positions(part: torch.Tensor, batch: Batch, world: World) -> torch.Tensor:
    """Values of all supervised positions [N of the whole micro-batch, ...] from each rank's own. Collective over CP."""
    if world.cp_size == 1:
        return part
    whole = part.new_zeros(batch["num_positions"], *part.shape[1:])
    whole[batch["kept"]] = part
    dist.all_reduce(whole, group=world.cp_group)  # every position is one rank's; the others add 0
    return whole


def _packed(batch: Batch) -> PackedSeqParams:
    bounds, longest = known(batch["cu_seqlens"], batch["bounds"]), batch["max_seqlen"]
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        # Transformer Engine asks for these under context parallelism; here padding is part of its segment.
        cu_seqlens_q_padded=bounds if "kept" in batch else None,
        cu_seqlens_kv_padded=bounds if "kept" in batch else None,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
