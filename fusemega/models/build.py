"""Empty Megatron models from Hugging Face configurations, and the walk that fills or reads them.

Shape suffixes: S tokens of a row (sequences, of scores), N positions that the head reads, H hidden, M objectives.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from fusemega.files.boxes import Box, slices, volume
from fusemega.models.architecture import Architecture
from fusemega.models.gated_head import GatedHead
from fusemega.models.heads import Head, ScalarHead
from fusemega.models.rules import Piece, Rule, WeightRanks, padded_vocab_size
from fusemega.models.stages import LAYER_NAME, balances, check_layout, layers_of_stages, megatron_stages
from fusemega.runtime.parallel import World
from fusemega.runtime.precision import LOCAL, Kernels
from fusemega.runtime.specs import LayerSettings, block_spec
from fusemega.runtime.text_rope import with_rope

from megatron.core.models.common.embeddings import RotaryEmbedding  # isort: skip
from megatron.core.models.common.language_module.language_module import LanguageModule  # isort: skip  (after
from megatron.core.models.gpt import GPTModel  # isort: skip  runtime.parallel has enabled the CPU backend)
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes  # isort: skip
from megatron.core.transformer import TransformerConfig  # isort: skip
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group  # isort: skip

# Of local experts, and of grouped products.
_EXPERT_NAME = re.compile(r"(mlp\.experts\.(?:local_experts\.|linear_fc[12]\.weight))(\d+)(.*)")


class Chunk(GPTModel):
    """Megatron's GPTModel without its vocabulary step: the last chunk returns hidden states, never logits.

    `forward(input_ids [1, S], position_ids [1, S], attention_mask None, packed_seq_params=...)` returns hidden
    states [S, 1, H] ([S/TP, 1, H] under sequence parallelism), after the final norm in the last chunk. Under context
    parallelism S counts this rank's tokens, while `packed_seq_params` describes the whole row.
    """

    def __init__(
        self, config: TransformerConfig, architecture: Architecture, world: World, vp_stage: int | None
    ) -> None:
        last = (config.virtual_pipeline_model_parallel_size or 1) - 1
        layers = architecture.layers
        super().__init__(
            config,
            block_spec(
                config, vp_stage, [layer.blocks for layer in layers], _layer_settings(architecture, config, world)
            ),
            padded_vocab_size(architecture.vocab_size, world.tp_size),
            architecture.hf_config.get("max_position_embeddings", 2048),
            # `vp_stage` counts the pieces of a stage under the interleaved schedule, and is None without it.
            pre_process=world.is_first_stage and not vp_stage,
            post_process=world.is_last_stage and (vp_stage or 0) == last,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=architecture.tied,
            vp_stage=vp_stage,
        )
        # These frequencies equal transformers' bit for bit (`rope.py`).
        self.rotary_pos_emb.inv_freq = architecture.inv_freq()
        if self.pre_process and architecture.embedding_scale is not None:
            scale = float(torch.tensor(architecture.embedding_scale, device="cpu").to(config.params_dtype))
            self.embedding.register_forward_hook(lambda _, __, embeddings: embeddings * scale)
        self._has_vocabulary = architecture.head == "vocabulary"
        if self.post_process and not self._has_vocabulary:
            del self.output_layer
            if architecture.gating is not None:
                self.score: torch.nn.Module = GatedHead(architecture.gating, config.hidden_size, config.params_dtype)
            elif architecture.head == "scalar":
                self.score = ScalarHead(config.hidden_size, config.params_dtype, world.tp_size)

    @property
    def head_module(self) -> torch.nn.Module | None:
        """The module with the head's weight; None if this chunk is not the last, or the model has no head."""
        return getattr(self, "output_layer" if self._has_vocabulary else "score", None)

    def _postprocess(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        head = self.head_module
        if head is not None:
            # The loss uses the head's weight without calling its module. Under overlap_param_gather the weight may
            # still be on its way, and only the module's hooks wait for it.
            for hook in head._forward_pre_hooks.values():
                hook(head, ())
        return hidden_states

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Megatron's; without a vocabulary head, not that of GPTModel and LanguageModule, which expect one."""
        state: dict[str, Any]
        if self._has_vocabulary:
            state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        else:
            metadata = ensure_metadata_has_dp_cp_group(metadata)
            state = super(LanguageModule, self).sharded_state_dict(prefix, sharded_offsets, metadata)
        return state


def _layer_settings(architecture: Architecture, config: TransformerConfig, world: World) -> LayerSettings:
    local_rope = None
    if (frequencies := architecture.local_inv_freq()) is not None:
        local_rope = RotaryEmbedding(config.kv_channels, 1.0, use_cpu_initialization=True, cp_group=world.cp_group)
        local_rope.inv_freq = frequencies
    return LayerSettings(architecture.norms_after, architecture.attention_softcap, local_rope)


class GPT(torch.nn.Module):
    """What one rank holds of a model: a chunk of layers, or several under the interleaved pipeline schedule.

    Code that needs parameters or state uses this one module; Megatron's schedules call the chunks.

    Attributes:
        chunks: in the order in which a token passes through them.
        config: Megatron's configuration, which the chunks share.
        architecture: the opened configuration.
    """

    chunks: Sequence[Chunk]

    def __init__(self, config: TransformerConfig, architecture: Architecture, world: World) -> None:
        super().__init__()
        virtual = config.virtual_pipeline_model_parallel_size
        stages = [None] if virtual is None else list(range(virtual))
        chunks = (Chunk(config, architecture, world, stage) for stage in stages)
        self.chunks = torch.nn.ModuleList(chunks)  # type: ignore[assignment]
        self.config = config
        self.architecture = architecture

    @property
    def hf_config(self) -> dict[str, Any]:
        """The Hugging Face configuration the model was built from."""
        return dict(self.architecture.hf_config)

    @property
    def vocab_size(self) -> int:
        """Number of ids in `config.json`, without padding."""
        return self.architecture.vocab_size

    def rules(self) -> list[Rule]:
        """The rules of all the model's weights, under the parameter names of its layer spec."""
        return self.architecture.rules(self.config.transformer_impl)

    @property
    def head(self) -> Head:
        """The head: its kind, its weight on this rank, and the cap of its logits.

        Raises:
            ValueError: this is not the last stage, or the model has no head.
        """
        last = self.chunks[-1]
        module = last.head_module
        if module is None:
            raise ValueError("no head here: the model has none, or this is not the last pipeline stage")
        tied = last.share_embeddings_and_output_weights
        weight: Any = last.shared_embedding_or_output_weight() if tied else module.weight
        return Head(self.architecture.head, weight, self.architecture.softcap)

    def scores(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """Scores [N] of a model with a scalar head: see `ScalarHead.forward`. Only on the last stage."""
        scores_N: torch.Tensor = self.chunks[-1].score(hidden_NH)
        return scores_N

    def gated_scores(self, last_SH: torch.Tensor, gate_SH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores [S] and objectives [S, M] of a model with a gated head: see `GatedHead.forward`. Last stage only."""
        scores_S, objectives_SM = self.chunks[-1].score(last_SH, gate_SH)
        return scores_S, objectives_SM

    def sharded_state_dict(self) -> dict[str, Any]:
        """Megatron's sharded state of all chunks, under this module's own names. Stored keys have no chunk in them."""
        return {
            f"chunks.{i}.{name}": value
            for i, chunk in enumerate(self.chunks)
            for name, value in chunk.sharded_state_dict().items()
        }


def build_model(
    architecture: Architecture,
    world: World,
    dtype: torch.dtype,
    kernels: Kernels = LOCAL,
    recompute: Mapping[str, Any] = MappingProxyType({}),
) -> GPT:
    """This rank's part of the model, on `world.device`, with *uninitialised* weights (see `fill`, `init_random`).

    Collective over the embedding group when embeddings are tied and there are several stages.

    Args:
        architecture: the opened configuration (from `registry.architecture_of`).
        world: this process's place in the layout.
        dtype: dtype of the parameters and of the tensors that pipeline stages send each other.
        kernels: implementation of the layers, and FP8; the weights are the same for all.
        recompute: TransformerConfig's fields that say which activations backward computes again.

    Raises:
        UserError: the layout does not divide the model.
    """
    layout = world.layout
    check_layout(architecture, layout)
    first, last = layout.num_layers_in_first_pipeline_stage, layout.num_layers_in_last_pipeline_stage
    if first is not None and layout.pipeline_model_parallel_size == 2:
        last = None  # the rest; given both, megatron-core divides by 0 (transformer/transformer_layer.py:138)
    stages = megatron_stages(layers_of_stages(architecture, layout)) if balances(architecture, layout) else None
    config = TransformerConfig(
        **architecture.transformer_config,
        **kernels.transformer_config(),
        **recompute,
        tensor_model_parallel_size=world.tp_size,
        context_parallel_size=world.cp_size,
        expert_model_parallel_size=world.ep_size,
        expert_tensor_parallel_size=world.expert_tp_size,
        moe_token_dispatcher_type=layout.moe_token_dispatcher_type,
        pipeline_model_parallel_size=world.pp_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
        overlap_p2p_comm=layout.overlap_p2p_comm,
        batch_p2p_comm=not layout.overlap_p2p_comm,
        # The host would wait for the device after each exchange, because of a fault that torch mended (pull 82450).
        batch_p2p_sync=False,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        # Where there are several stages, `passes/batches.py` makes all micro-batches of a step equally long.
        variable_seq_lengths=False,
        use_cpu_initialization=True,
        perform_initialization=False,  # `fill` or `init_random` sets every weight
        # Kernels of Transformer Engine or apex, or torch.compile: none is needed, and each changes rounding.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        # Layers of different parts cannot be stacked: each is stored under its own number.
        pipeline_model_parallel_layout=stages,
        hetereogenous_dist_checkpoint=not architecture.alike,
    )
    with_rope(config, architecture.text_rope())
    model = GPT(config, architecture, world).to(world.device)
    for placement in placements(model, world):
        # Megatron sets these marks while it draws initial weights (tensor_parallel/layers.py:151), which is off here.
        # Biases have theirs already, and Transformer Engine sets its own. Without the marks Megatron's gradient norm
        # counts a split matrix on the first rank only.
        if placement.rule.partition_dim is not None and not hasattr(placement.parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(placement.parameter, True, placement.rule.partition_dim, 1)
        if placement.rule.expert is not None:
            # Megatron's mark of what has data-parallel ranks, buffers and an optimizer of its own. It sets it where
            # experts are dealt out; here always, so that a checkpoint has the same parts in every layout.
            placement.parameter.allreduce = False  # type: ignore[attr-defined]
    return model


@dataclass(frozen=True)
class Placement:
    """A parameter of this rank, its rule, and the boxes of HF tensors that fill it."""

    parameter: torch.nn.Parameter
    rule: Rule
    pieces: list[Piece]


def placements(model: GPT, world: World) -> list[Placement]:
    """Every parameter of this rank with its rule, in the model's order."""
    rules = {rule.megatron: rule for rule in model.rules()}
    ranks = WeightRanks.of(world)
    out = []
    for name, parameter in ((_global_name(c, n, ranks), p) for c in model.chunks for n, p in c.named_parameters()):
        rule = rules[name]
        built, wanted = tuple(parameter.shape), rule.local_shape(ranks)
        if built != wanted:
            raise RuntimeError(f"{name}: Megatron built {built}, the rule says {wanted}")
        out.append(Placement(parameter, rule, rule.pieces(ranks)))
    return out


def _global_name(chunk: Chunk, name: str, ranks: WeightRanks) -> str:
    """A chunk numbers its layers and experts from 0; rules number those of the whole model."""
    match = LAYER_NAME.match(name)
    if match is None:
        return name
    layer, inside = chunk.decoder.layers[int(match[1])], match[2]
    if (expert := _EXPERT_NAME.match(inside)) is not None:
        number = int(expert[2]) + ranks.ep_rank * layer.mlp.num_local_experts
        inside = f"{expert[1]}{number}{expert[3]}"
    return f"decoder.layers.{layer.layer_number - 1}.{inside}"


@torch.no_grad()
def fill(model: GPT, world: World, read: Callable[[str, Box], torch.Tensor]) -> None:
    """Set this rank's parameters from boxes of HF tensors, converted to the parameters' dtype; padding rows to 0.

    Args:
        model: from `build_model`.
        world: the layout it was built for.
        read: (HF tensor name, box) -> that box, of any floating dtype.
    """
    for placement in placements(model, world):
        if sum(volume(piece.local_box) for piece in placement.pieces) < placement.parameter.numel():
            placement.parameter.zero_()
        for piece in placement.pieces:
            placement.parameter[slices(piece.local_box)].copy_(read(piece.hf, piece.hf_box))


def init_random(model: GPT, world: World, seed: int) -> None:
    """Draw the weights a model starts with when it is trained from scratch; the same under every layout.

    Matrices are normal(0, `initializer_range`, 0.02 where the configuration has none), norms scale by 1 and biases are
    0, as transformers initialises them. Each HF tensor is drawn whole in float32 from a generator seeded by `seed` and
    its name.
    """
    norms = torch.zeros if model.config.layernorm_zero_centered_gamma else torch.ones
    std = model.hf_config.get("initializer_range", 0.02)
    shapes = model.architecture.hf_shapes()
    last: dict[str, torch.Tensor] = {}

    def read(name: str, box: Box) -> torch.Tensor:
        if name not in last:  # a q/k/v parameter reads its three tensors in turns, group by group
            if len(last) == 3:
                last.clear()
            if len(shapes[name]) == 1:
                last[name] = (torch.zeros if name.endswith(".bias") else norms)(shapes[name])
            else:
                # crc32, because Python's own hash of a string differs from process to process.
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
                last[name] = torch.empty(shapes[name]).normal_(0.0, std, generator=generator)
        return last[name][slices(box)]

    fill(model, world, read)
