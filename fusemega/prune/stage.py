"""The blocks of this rank's pipeline stage, run one by one: masking a block skips it, and the stream passes it by.

Megatron calls whole layers only. Here a layer's two halves are called, each with its norms and its sum
(transformer/transformer_layer.py: `_forward_attention`, `_forward_mlp`), so a run can begin at any block.

Shape suffixes: T tokens of a row (of this context-parallel rank; under sequence parallelism of this rank), N supervised
positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams

from fusemega.models.build import GPT
from fusemega.passes.forward import packed_row, supervised_hidden
from fusemega.passes.micro_batch import MicroBatch
from fusemega.prune.order import ResidualBlock, blocks_of
from fusemega.runtime.parallel import World


@dataclass(frozen=True, eq=False)
class CalibrationRow:
    """A micro-batch with what every layer needs of it, made once.

    Attributes:
        batch: its tokens and labels, on the device.
        packed: its segments.
        rope: rotary frequencies of its positions.
    """

    batch: MicroBatch
    packed: PackedSeqParams
    rope: torch.Tensor


class StageBlocks:
    """What this rank holds of a model.

    Attributes:
        blocks: of the whole model, in the order of the stream.
        own: those of this stage.
        blocks_run: how often a block was run for a row, so far.
    """

    def __init__(self, gpt: GPT, world: World) -> None:
        (chunk,) = gpt.chunks
        gpt.eval()
        self.gpt, self.world = gpt, world
        self._chunk = chunk
        self._layers = {layer.layer_number - 1: layer for layer in chunk.decoder.layers}
        self.blocks = blocks_of(gpt.architecture)
        self.own = tuple(block for block in self.blocks if block.layer in self._layers)
        self.blocks_run = 0

    def rows(self, batches: Iterable[MicroBatch]) -> list[CalibrationRow]:
        """The micro-batches, on the device."""
        out = []
        for batch in batches:
            batch = batch.to(self.world.device)
            packed = packed_row(batch)
            rope = self._chunk.rotary_pos_emb(packed.max_seqlen_q, packed_seq=True)
            out.append(CalibrationRow(batch, packed, rope))
        return out

    def begin(self, row: CalibrationRow) -> torch.Tensor:
        """What the first block of this stage reads, [T, 1, H]: the embeddings, or what the stage before sends."""
        if self.world.is_first_stage:
            hidden: torch.Tensor = self._chunk.embedding(row.batch.tokens, row.batch.position_ids)
            return hidden
        tokens = row.batch.tokens.size(1) // (self.world.tp_size if self.world.sequence_parallel else 1)
        config = self.gpt.config
        hidden = torch.empty(tokens, 1, config.hidden_size, dtype=config.params_dtype, device=self.world.device)
        dist.recv(hidden, self._neighbour(-1), group=self.world.pp_group)
        return hidden

    def run(self, block: ResidualBlock, hidden_T1H: torch.Tensor, row: CalibrationRow) -> torch.Tensor:
        """The stream after a block of this stage, from the stream before it, which is left as it is."""
        self.blocks_run += 1
        layer = self._layers[block.layer]
        out: torch.Tensor
        if block.kind == "mha":
            out, _ = layer._forward_attention(
                hidden_states=hidden_T1H, attention_mask=None, rotary_pos_emb=row.rope, packed_seq_params=row.packed
            )
        else:
            out = layer._forward_mlp(hidden_T1H)
        return out

    def hand_on(self, hidden_T1H: torch.Tensor) -> None:
        """Sends the stream after this stage's last block to the next stage."""
        dist.send(hidden_T1H.contiguous(), self._neighbour(1), group=self.world.pp_group)

    def final(self, hidden_T1H: torch.Tensor, row: CalibrationRow) -> torch.Tensor:
        """Of the last stage: [N, H], what the head reads at supervised positions, after the final norm."""
        return supervised_hidden(self._chunk.decoder.final_layernorm(hidden_T1H), row.batch.positions, self.world)

    def agreed(self, values: Sequence[torch.Tensor]) -> float:
        """The sum of the last stage's fp64 values, over context-parallel ranks too, on every rank of this replica."""
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for value in values:
            total += value
        dist.all_reduce(total, group=self.world.cp_group)
        dist.all_reduce(total, group=self.world.pp_group)  # the other stages have nothing to add
        # Ranks that drop a candidate must do so together, so not even the last bit may differ.
        dist.all_reduce(total, op=dist.ReduceOp.MAX, group=self.world.tp_group)
        return float(total)

    def _neighbour(self, step: int) -> int:
        return dist.get_global_rank(self.world.pp_group, self.world.pp_rank + step)
