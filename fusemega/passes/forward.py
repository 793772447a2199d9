"""One micro-batch through a Megatron model, up to the hidden states or log-probabilities that a loss asks for.

Shape suffixes: T tokens of the packed row, N supervised positions, S sequences, M sums of each, H hidden size, K listed
ids of a query (here 1), V this rank's rows of the output weight. Under context parallelism T and N count this rank's
own, unless stated otherwise. In the kernel's `logp_TK`, T stands for N.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
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
from fusemega.models.build import GPT
from fusemega.passes.answers import HiddenStates
from fusemega.passes.micro_batch import MicroBatch
from fusemega.runtime.context_parallel import sum_over_context
from fusemega.runtime.forward_clock import ForwardClock
from fusemega.runtime.parallel import World
from fusemega.runtime.segments import known

# (hidden_NH, batch) -> (scalar loss, what the schedule collects for this micro-batch)
LossFunction = Callable[[torch.Tensor, MicroBatch], tuple[torch.Tensor, Any]]


def supervised_hidden(hidden_T1H: torch.Tensor, positions_N: torch.Tensor, world: World) -> torch.Tensor:
    """Rows of the last stage's output that predict supervised tokens, [N, H], the same on each TP rank.

    Backward sums the TP ranks' partial gradients (reduce-scatters them under sequence parallelism), as the
    vocabulary kernel expects. Rows are picked first, so only they are sent, except under sequence parallelism.
    """
    if world.sequence_parallel:
        # Each rank holds a part of T, and `positions_N` counts all of T.
        hidden_T1H = gather_from_sequence_parallel_region(
            hidden_T1H, tensor_parallel_output_grad=True, group=world.tp_group
        )
        return hidden_T1H[positions_N, 0]
    return copy_to_tensor_model_parallel_region(hidden_T1H[positions_N, 0], group=world.tp_group)


def supervised_rows(batch: MicroBatch) -> torch.Tensor:
    """int64 [N], for `run_schedule`: the supervised positions."""
    return batch.positions


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    loss_function: LossFunction,
    world: World,
    *,
    forward_only: bool,
    rows: Callable[[MicroBatch], torch.Tensor] = supervised_rows,
    clock: ForwardClock | None = None,
) -> list[Any]:
    """Megatron's schedule over one step's micro-batches.

    Args:
        chunks: what this rank holds of the model (bare or under DistributedDataParallel).
        micro_batches: this data-parallel rank's micro-batches, in order; at least one; all of the same T where
            there are several pipeline stages; and as many as the layout's `micro_batch_multiple` asks for.
        loss_function: called on the last stage, micro-batch by micro-batch in order.
        forward_only: no backward.
        rows: picks the tokens whose hidden states `loss_function` gets; default: the supervised positions.
        clock: measures the forward passes.

    Returns:
        What `loss_function` collected, a list over micro-batches; empty except on the last stage.
    """

    def forward_step(batches: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        batch = next(batches)
        with nullcontext() if clock is None else clock.forward(batch.tokens.numel()):
            output = chunk(batch.tokens, batch.position_ids, None, packed_seq_params=packed_row(batch))

        def loss(hidden_T1H: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
            value, collected = loss_function(supervised_hidden(hidden_T1H, rows(batch), world), batch)
            # The middle value is Megatron's token count, by which it would divide. Our loss is divided already
            # (`training/optimizer.py`).
            return value, torch.zeros((), dtype=torch.int, device=world.device), collected

        return output, loss

    collected: list[Any] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(micro_batches) for _ in chunks],  # each chunk takes every micro-batch
        model=list(chunks),
        num_microbatches=len(micro_batches),
        # Of the whole row: Megatron divides by CP, and by TP under sequence parallelism, to know what stages send.
        seq_length=micro_batches[0].tokens.size(1) * world.cp_size,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return collected


def head_settings(gpt: GPT, world: World) -> dict[str, Any]:
    """The vocabulary kernel's arguments besides hidden states and weight. Only on the last stage."""
    return {"group": world.tp_group, "vocab_size": gpt.vocab_size, "softcap": gpt.head.softcap}


def hidden_states(gpt: GPT, hidden_NH: torch.Tensor, world: World) -> HiddenStates:
    """A model's final hidden states with its own head. Only on the last stage."""
    return HiddenStates(hidden_NH, gpt.head.weight, head_settings(gpt, world))


def sequence_log_probs(states: HiddenStates, batch: MicroBatch, world: World) -> torch.Tensor:
    """[S]: the log-probability of each sequence's supervised tokens, summed; differentiable. Where the micro-batch has
    token weights [N, M]: [S, M], the sum with each of these weights.

    Collective over context parallelism: each of its ranks gets the sums over all tokens, and passes the gradient to
    its own tokens alone.
    """
    query = Query(batch.labels[:, None])
    logp_N = sparse_log_probs(states.hidden_NH, states.weight_VH, query, **states.head).logp_TK[:, 0]
    if batch.token_weights is not None:
        logp_N = logp_N[:, None] * batch.token_weights.to(logp_N.dtype)  # [N, M] from here on
    logp_S = logp_N.new_zeros(len(batch.sequence_tokens), *logp_N.shape[1:]).index_add(0, batch.sequences, logp_N)
    return sum_over_context(logp_S, world.cp_group) if world.cp_size > 1 else logp_S


def last_rows(batch: MicroBatch) -> torch.Tensor:
    """int64 [S], for `run_schedule`: each sequence's last token, or any token if another rank has the last one."""
    return batch.last_tokens.clamp(min=0)


def sequence_scores(gpt: GPT, hidden_SH: torch.Tensor, batch: MicroBatch, world: World) -> torch.Tensor:
    """[S]: what a scalar head gives for each sequence's last token; differentiable. Only on the last stage.

    Collective over context parallelism: each of its ranks gets all scores, and passes the gradient to its own tokens.

    Args:
        hidden_SH: hidden states of the tokens that `last_rows` picks.
    """
    scores_S = gpt.scores(hidden_SH)
    if world.cp_size == 1:
        return scores_S
    return sum_over_context(torch.where(batch.last_tokens >= 0, scores_S, 0.0), world.cp_group)


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


def whole_positions(part: torch.Tensor, batch: MicroBatch, world: World) -> torch.Tensor:
    """Values of all supervised positions [N of the whole micro-batch, ...] from each rank's own. Collective over CP."""
    if batch.kept is None:
        return part
    whole = part.new_zeros(batch.num_positions, *part.shape[1:])
    whole[batch.kept] = part
    dist.all_reduce(whole, group=world.cp_group)  # every position is one rank's; the others add 0
    return whole


def packed_row(batch: MicroBatch) -> PackedSeqParams:
    """What Megatron's attention is told of a packed row."""
    bounds = known(batch.cu_seqlens, batch.bounds, batch.prefixes, batch.texts)
    longest, is_part = batch.max_seqlen, batch.kept is not None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        # Transformer Engine asks for these under context parallelism; here padding is part of its segment.
        cu_seqlens_q_padded=bounds if is_part else None,
        cu_seqlens_kv_padded=bounds if is_part else None,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
