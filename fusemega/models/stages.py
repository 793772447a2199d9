"""Which layers, and which of a model's parameters, each pipeline stage holds; layouts that divide a model."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from fusemega.errors import UserError
from fusemega.models.architecture import Architecture
from fusemega.models.parts import Experts, GatedMLP, Names
from fusemega.models.rules import Rule

if TYPE_CHECKING:
    from fusemega.runtime.parallel import ParallelConfig

LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.*)")


def check_layout(architecture: Architecture, layout: ParallelConfig) -> None:
    """Refuses a layout that does not divide the model.

    Raises:
        UserError: names the sizes and the allowed layouts.
    """
    config = architecture.transformer_config
    tp_size = layout.tensor_model_parallel_size
    _check_experts(architecture, layout)
    heads, groups, ffn = (config[k] for k in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"))
    if not any(isinstance(layer.mlp, GatedMLP) for layer in architecture.layers):
        ffn = heads  # no layer has an MLP of this size

    # The vocabulary need not divide: it is padded (`rules.padded_vocab_size`).
    def divides(size: int) -> bool:
        """With more ranks than key/value heads, as many ranks share each, and equal shares of its rows."""
        shared = groups % size == 0 or (size % groups == 0 and (heads + 2 * groups) * config["kv_channels"] % size == 0)
        return shared and heads % size == 0 and ffn % size == 0

    if not divides(tp_size):
        allowed = [size for size in range(1, heads + 1) if divides(size)]
        raise UserError(
            f"parallel.tensor_model_parallel_size: {tp_size} does not divide this model's {heads} attention heads, "
            f"{groups} key/value heads (or is no multiple of them) and feed-forward size {ffn}; allowed: "
            f"{', '.join(map(str, allowed))}"
        )
    stages = layers_of_stages(architecture, layout)
    without = [
        number
        for number, pieces in enumerate(stages)
        if not any(isinstance(architecture.layers[layer].mlp, Experts) for piece in pieces for layer in piece)
    ]
    # Experts have an optimizer of their own, and all stages save and load as many.
    if without and len(without) < len(stages):
        raise UserError(
            f"parallel.pipeline_model_parallel_size: stage {without[0]} of {len(stages)} would have no layer with "
            "experts, and others have some; allowed: fewer stages, or others (num_layers_in_first_pipeline_stage, "
            "num_layers_in_last_pipeline_stage)"
        )


def _check_experts(architecture: Architecture, layout: ParallelConfig) -> None:
    """`check_layout` for what parallelism of experts needs."""
    found = {layer.mlp for layer in architecture.layers if isinstance(layer.mlp, Experts)}
    if not found:
        for key in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
            if (getattr(layout, key) or 1) > 1:
                raise UserError(f"parallel.{key}: {getattr(layout, key)}, and this model has no experts; allowed: 1")
        return
    ((experts, expert_ffn),) = {(mlp.experts, mlp.ffn) for mlp in found}
    for key, size, count, what in (
        ("expert_model_parallel_size", layout.expert_model_parallel_size, experts, "experts"),
        ("expert_tensor_parallel_size", layout.expert_tp_size, expert_ffn, "as the feed-forward size of an expert"),
    ):
        if count % size:
            allowed = [n for n in range(1, min(count, 1024) + 1) if count % n == 0]
            raise UserError(
                f"parallel.{key}: {size} does not divide this model's {count} {what}; "
                f"allowed: {', '.join(map(str, allowed))}"
            )
    if layout.tensor_model_parallel_size > 1 and not layout.sequence_parallel:
        raise UserError(
            "parallel.sequence_parallel: a model with experts needs it where tensor_model_parallel_size is 2 or more, "
            "or each token would go to its experts once a tensor-parallel rank; allowed: true"
        )


def layers_of_stages(architecture: Architecture, layout: ParallelConfig) -> list[list[range]]:
    """[stage][virtual stage] -> its layers, as `stage_layers`; stages of unlike layers get about as many parameters.

    Where all layers have the same parts, or the layout says how many layers a stage has, layers are counted instead.

    Raises:
        UserError: as `stage_layers`.
    """
    if not balances(architecture, layout):
        return stage_layers(len(architecture.layers), layout)
    stages, virtual = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size or 1
    sizes = [_parameters(architecture, layer) for layer in range(len(architecture.layers))]
    if len(sizes) < stages * virtual:
        raise UserError(
            f"parallel.pipeline_model_parallel_size: {stages} stages of {virtual} piece(s) need {stages * virtual} "
            f"layers, and this model has {len(sizes)}"
        )
    pieces = balanced(sizes, stages * virtual)
    return [pieces[stage::stages] for stage in range(stages)]


def balances(architecture: Architecture, layout: ParallelConfig) -> bool:
    """Whether stages are made of about as many parameters, and not of as many layers."""
    given = (layout.num_layers_in_first_pipeline_stage, layout.num_layers_in_last_pipeline_stage)
    return layout.pipeline_model_parallel_size > 1 and not architecture.alike and given == (None, None)


def balanced(sizes: Sequence[int], parts: int) -> list[range]:
    """Consecutive runs of at least one size each, so that the largest sum is as small as can be.

    Args:
        sizes: at least as many as `parts`.
        parts: how many runs.

    Example:
        >>> balanced([1, 1, 1, 3], 2)
        [range(0, 3), range(3, 4)]
    """
    ends = list(accumulate(sizes, initial=0))
    # best[n]: the smallest largest sum of the first n sizes in the runs so far, and where the last of them begins.
    best = [(ends[n], 0) for n in range(len(ends))]
    begins = []
    for part in range(1, parts):
        begins.append([start for _, start in best])
        best = [
            min(
                ((max(best[start][0], ends[n] - ends[start]), start) for start in range(part, n)), default=(ends[-1], 0)
            )
            for n in range(len(ends))
        ]
    begins.append([start for _, start in best])
    runs, stop = [], len(sizes)
    for starts in reversed(begins):
        runs.append(range(starts[stop], stop))
        stop = starts[stop]
    return runs[::-1]


def megatron_stages(stages: Sequence[Sequence[range]]) -> list[list[str]]:
    """`pipeline_model_parallel_layout` of megatron-core: what each piece holds, in the order of a token's way."""
    pieces = [["decoder"] * len(stage[piece]) for piece in range(len(stages[0])) for stage in stages]
    return [["embedding", *pieces[0]], *pieces[1:-1], [*pieces[-1], "loss"]]


def _parameters(architecture: Architecture, layer: int) -> int:
    rules = architecture.layers[layer].rules(Names("", "", "local"))
    return sum(math.prod(shape) for rule in rules for shape in rule.hf_shapes().values())


def stage_layers(num_layers: int, layout: ParallelConfig) -> list[list[range]]:
    """[stage][virtual stage] -> its layers, numbered from 0 over the whole model.

    Piece v of every stage comes before piece v + 1 of any: with two stages of two pieces of a layer each, stage 0 holds
    layers 0 and 2.

    Raises:
        UserError: the layers cannot be divided in this way; names the key.
    """
    counts = _layers_of_stages(num_layers, layout)
    virtual = layout.virtual_pipeline_model_parallel_size or 1
    for stage, count in enumerate(counts):
        if count % virtual:
            raise UserError(
                f"parallel.virtual_pipeline_model_parallel_size: {virtual} does not divide the {count} layers of stage "
                f"{stage}; allowed: {', '.join(str(n) for n in range(2, count + 1) if count % n == 0) or 'none'}"
            )
    pieces: list[list[range]] = [[] for _ in counts]
    start = 0
    for _ in range(virtual):
        for stage, count in enumerate(counts):
            pieces[stage].append(range(start, start + count // virtual))
            start += count // virtual
    return pieces


def _layers_of_stages(num_layers: int, layout: ParallelConfig) -> list[int]:
    """How many layers each stage has. Stages for which no number is given share the rest evenly."""
    pp_size = layout.pipeline_model_parallel_size
    first, last = layout.num_layers_in_first_pipeline_stage, layout.num_layers_in_last_pipeline_stage
    if first is None and last is None:
        if num_layers % pp_size:
            allowed = [n for n in range(1, num_layers + 1) if num_layers % n == 0]
            raise UserError(
                f"parallel.pipeline_model_parallel_size: {pp_size} does not divide this model's {num_layers} layers; "
                f"allowed: {', '.join(map(str, allowed))} (or num_layers_in_first_pipeline_stage, "
                "num_layers_in_last_pipeline_stage)"
            )
        return [num_layers // pp_size] * pp_size
    given = {"num_layers_in_first_pipeline_stage": first, "num_layers_in_last_pipeline_stage": last}
    said = {name: count for name, count in given.items() if count is not None}
    left, stages = num_layers - sum(said.values()), pp_size - len(said)
    if (stages and (left < stages or left % stages)) or (not stages and left):
        wanted = f"a positive multiple of {stages}" if stages else "0"
        raise UserError(
            f"parallel.{next(iter(said))}: {' and '.join(f'{name} {count}' for name, count in said.items())} leave "
            f"{left} of this model's {num_layers} layers to the {stages} other stage(s) of "
            f"pipeline_model_parallel_size {pp_size}; allowed: what leaves {wanted}"
        )
    counts = [left // stages if stages else 0] * pp_size
    if first is not None:
        counts[0] = first
    if last is not None:
        counts[-1] = last
    return counts


def stage_rules(architecture: Architecture, layout: ParallelConfig, pp_rank: int) -> list[Rule]:
    """The rules of the parameters that `build_model` would make on one stage; makes none. A rank of expert parallelism
    has some of the experts' (`Rule.held_by`).

    Args:
        architecture: the opened configuration.
        layout: divides the model (see `check_layout`).
        pp_rank: the stage.
    """
    pp_size = layout.pipeline_model_parallel_size
    stages = layers_of_stages(architecture, layout)
    layers = {layer for piece in stages[pp_rank] for layer in piece}
    out = []
    for rule in architecture.rules():
        match = LAYER_NAME.match(rule.megatron)
        if match is not None:
            here = int(match[1]) in layers
        else:
            here = pp_rank == (0 if rule.megatron.startswith("embedding.") else pp_size - 1)
        # The copy of a tied head exists only where the embedding is on another stage.
        if here and not (rule.duplicate and pp_size == 1):
            out.append(rule)
    return out
