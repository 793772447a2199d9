"""Empty Megatron models from Hugging Face configurations, and the walk that fills or reads them.

Legend: S tokens of a row, H hidden, V_padded vocabulary padded to a multiple of TP.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fusemega.errors import UserError
from fusemega.models.family import LOCAL_NAMES, TRANSFORMER_ENGINE_NAMES, Family, HFConfig
from fusemega.models.registry import family_of
from fusemega.models.rules import Box, Piece, Rule, padded_vocab_size, slices, volume
from fusemega.runtime.parallel import World
from fusemega.runtime.precision import LOCAL, Kernels
from fusemega.runtime.specs import block_spec

from megatron.core.models.gpt import GPTModel  # isort: skip  (after runtime.parallel has enabled the CPU backend)
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes  # isort: skip
from megatron.core.transformer import TransformerConfig  # isort: skip


_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")


class GPT(GPTModel):
    """Megatron's GPTModel without its vocabulary step: the last stage returns hidden states, never logits.

    `forward(input_ids [1, S], position_ids [1, S], attention_mask None, packed_seq_params=...)` returns hidden
    states [S, 1, H] ([S/TP, 1, H] under sequence parallelism), after the final norm on the last stage.

    Attributes:
        hf_config: the Hugging Face configuration the model was built from.
        family: its family.
        vocab_size: HF's vocabulary size, without padding.
    """

    def __init__(self, config: TransformerConfig, hf_config: HFConfig, family: Family, world: World) -> None:
        super().__init__(
            config,
            block_spec(config),
            padded_vocab_size(hf_config["vocab_size"], world.tp_size),
            hf_config.get("max_position_embeddings", 2048),
            pre_process=world.is_first_stage,
            post_process=world.is_last_stage,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=family.tied(hf_config),
        )
        self.hf_config = dict(hf_config)
        self.family = family
        self.vocab_size = hf_config["vocab_size"]
        self.rotary_pos_emb.inv_freq = family.inv_freq(hf_config)

    def _postprocess(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states

    def rules(self) -> list[Rule]:
        """The family's weight rules, under the parameter names of this model's layer spec."""
        fused = self.config.transformer_impl == "transformer_engine"
        return self.family.rules(self.hf_config, TRANSFORMER_ENGINE_NAMES if fused else LOCAL_NAMES)

    def head_weight(self) -> torch.nn.Parameter:
        """The head's rows on this rank, [V_padded / TP, H], tied or not. Only on the last stage."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def check_layout(hf_config: HFConfig, tp_size: int, pp_size: int) -> None:
    """Refuses a layout that does not divide the model.

    Raises:
        UserError: names the sizes and the layouts that would do.
    """
    config = family_of(hf_config).transformer_config(hf_config)
    heads, groups, ffn = (config[k] for k in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"))
    if any(n % tp_size for n in (heads, groups, ffn)):
        allowed = [n for n in range(1, groups + 1) if not any(m % n for m in (heads, groups, ffn))]
        reason = "; more ranks than key/value heads is not supported" if tp_size > groups else ""
        raise UserError(
            f"parallel.tensor_model_parallel_size: {tp_size} does not divide this model's {heads} attention heads, "
            f"{groups} key/value heads and feed-forward size {ffn}{reason}; allowed: {', '.join(map(str, allowed))}"
        )
    layers = config["num_layers"]
    if layers % pp_size:
        allowed = [n for n in range(1, layers + 1) if layers % n == 0]
        raise UserError(
            f"parallel.pipeline_model_parallel_size: {pp_size} does not divide this model's {layers} layers; "
            f"allowed: {', '.join(map(str, allowed))}"
        )


def stage_rules(hf_config: HFConfig, pp_size: int, pp_rank: int) -> list[Rule]:
    """The rules of the parameters that `build_model` makes on one stage, without making any.

    Args:
        hf_config: `config.json` as a mapping.
        pp_size: the number of stages, which divides the layers (see `check_layout`).
        pp_rank: the stage.
    """
    family = family_of(hf_config)
    layers_each = family.transformer_config(hf_config)["num_layers"] // pp_size
    out = []
    for rule in family.rules(hf_config):
        match = _LAYER.match(rule.megatron)
        if match is not None:
            stage = int(match[1]) // layers_each
        else:
            stage = 0 if rule.megatron.startswith("embedding.") else pp_size - 1
        # The copy of a tied head exists only where the embedding is on another stage.
        if stage == pp_rank and not (rule.duplicate and pp_size == 1):
            out.append(rule)
    return out


def build_model(hf_config: HFConfig, world: World, dtype: torch.dtype, kernels: Kernels = LOCAL) -> GPT:
    """This rank's part of the model, on `world.device`, with *uninitialised* weights (see `fill`, `init_random`).

    Collective over the embedding group when embeddings are tied and there are several stages.

    Args:
        hf_config: `config.json` as a mapping.
        world: the layout.
        dtype: of the parameters, and of what pipeline stages send each other.
        kernels: whose layers, and FP8; the weights are the same whichever it is.

    Raises:
        UserError: the family refuses the configuration, or the layout does not divide it.
    """
    family = family_of(hf_config)
    check_layout(hf_config, world.tp_size, world.pp_size)
    config = TransformerConfig(
        **family.transformer_config(hf_config),
        **kernels.transformer_config(),
        tensor_model_parallel_size=world.tp_size,
        pipeline_model_parallel_size=world.pp_size,
        sequence_parallel=world.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        variable_seq_lengths=False,
        use_cpu_initialization=True,
        perform_initialization=False,
        # Kernels of Transformer Engine and apex, or torch.compile: none is needed, and each changes rounding.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
    )
    model = GPT(config, hf_config, family, world).to(world.device)
    for placement in placements(model, world):
        # Megatron sets these marks while it draws initial weights (tensor_parallel/layers.py:151), which is off; it
        # has set those of biases, and Transformer Engine sets its own. Without them Megatron's gradient norm counts a
        # split matrix on the first rank alone.
        if placement.rule.partition_dim is not None and not hasattr(placement.parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(placement.parameter, True, placement.rule.partition_dim, 1)
    return model


@dataclass(frozen=True)
class Placement:
    """A parameter of this rank, its rule, and what this rank holds of which HF tensors."""

    parameter: torch.nn.Parameter
    rule: Rule
    pieces: list[Piece]


def placements(model: GPT, world: World) -> list[Placement]:
    """Every parameter of this rank with its rule, in the model's order."""
    rules = {rule.megatron: rule for rule in model.rules()}
    out = []
    for name, parameter in model.named_parameters():
        rule = rules[_global_name(model, name)]
        if tuple(parameter.shape) != rule.local_shape(world.tp_size):
            raise RuntimeError(
                f"{name}: Megatron built {tuple(parameter.shape)}, the rule says {rule.local_shape(world.tp_size)}"
            )
        out.append(Placement(parameter, rule, rule.pieces(world.tp_size, world.tp_rank)))
    return out


def _global_name(model: GPT, name: str) -> str:
    """A stage numbers its layers from 0; rules number those of the whole model."""
    match = _LAYER.match(name)
    if match is None:
        return name
    layer = model.decoder.layers[int(match[1])].layer_number - 1
    return f"decoder.layers.{layer}.{match[2]}"


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

    Matrices are normal(0, `initializer_range`, 0.02 where the configuration has none), norms 1 and biases 0, as
    transformers initialises them. Each HF tensor is drawn whole in float32 from a generator seeded by `seed` and its
    name.
    """
    std = model.hf_config.get("initializer_range", 0.02)
    shapes = {name: shape for rule in model.rules() for name, shape in rule.hf_shapes().items()}
    last: dict[str, torch.Tensor] = {}

    def read(name: str, box: Box) -> torch.Tensor:
        if name not in last:  # a q/k/v parameter comes back for the same three tensors group by group
            if len(last) == 3:
                last.clear()
            if len(shapes[name]) == 1:
                last[name] = (torch.zeros if name.endswith(".bias") else torch.ones)(shapes[name])
            else:
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
                last[name] = torch.empty(shapes[name]).normal_(0.0, std, generator=generator)
        return last[name][slices(box)]

    fill(model, world, read)
