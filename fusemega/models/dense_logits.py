"""Whole logits of a short text, to compare a model with another implementation. Training never calls this.

Shape suffixes: S tokens, H hidden, V vocabulary, M objectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func

from fusemega.models.build import GPT, Chunk
from fusemega.models.heads import REWARD
from fusemega.runtime.parallel import World


@torch.no_grad()
def dense_logits(model: GPT, world: World, texts: Sequence[Sequence[int]]) -> torch.Tensor | None:
    """Logits of several texts packed in one row, through the pipeline. Collective over the model-parallel ranks.

    A model with a scalar head gives the score of every token, one with a gated head its objectives, and one without a
    head its hidden states.

    Args:
        model: from `build_model`, filled.
        world: its layout, without context parallelism.
        texts: token ids of each segment; under sequence parallelism their total length is a multiple of TP.

    Returns:
        float32 [S, V] (S = all tokens, V without padding) on the last stage's ranks; None elsewhere.
        Scores are [S, 1], objectives [S, M], hidden states [S, H].
    """
    if world.cp_size > 1:
        raise ValueError("dense_logits takes whole rows, and context parallelism splits them")
    lengths = torch.tensor([len(text) for text in texts], dtype=torch.int32)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0, dtype=torch.int32)]).to(world.device)
    tokens = torch.tensor([token for text in texts for token in text], device=world.device)[None]
    positions = torch.cat([torch.arange(len(text)) for text in texts]).to(world.device)[None]
    longest = max(len(text) for text in texts)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )

    def forward_step(_: None, chunk: Chunk) -> tuple[torch.Tensor, Any]:
        return chunk(tokens, positions, None, packed_seq_params=packed), lambda hidden, non_loss_data: hidden

    # With collect_non_loss_data Megatron returns what the second function of `forward_step` gives. The interleaved
    # schedule takes several micro-batches at least; all hold the same texts, and the first is used.
    was_training = model.training
    model.eval()
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[None] * len(model.chunks),
        model=list(model.chunks),
        num_microbatches=world.layout.micro_batch_multiple,
        seq_length=tokens.numel(),
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    model.train(was_training)
    if not world.is_last_stage:
        return None
    hidden_SH = outputs[0][:, 0]
    if world.sequence_parallel:
        hidden_SH = torch.cat(_gather(hidden_SH, world))
    if model.architecture.head == "none":
        return hidden_SH.float()
    head = model.head
    if head.kind in REWARD:
        return (hidden_SH @ head.weight.T).float()
    logits_SV = torch.cat(_gather(hidden_SH @ head.weight.T, world), dim=1)[:, : model.vocab_size].float()
    return logits_SV if head.softcap is None else head.softcap * torch.tanh(logits_SV / head.softcap)


def _gather(tensor: torch.Tensor, world: World) -> list[torch.Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(world.tp_size)]
    dist.all_gather(parts, tensor.contiguous(), group=world.tp_group)
    return parts
