"""Which layers, and which of a model's parameters, each pipeline stage holds; layouts that divide a model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from fusemega.errors import UserError
from fusemega.models.architecture import Architecture
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
    heads, groups, ffn = (config[k] for k in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"))
    # The vocabulary need not divide: it is padded (`rules.padded_vocab_size`).
    if any(n % tp_size for n in (heads, groups, ffn)):
        allowed = [n for n in range(1, groups + 1) if not any(m % n for m in (heads, groups, ffn))]
        reason = "; more ranks than key/value heads is not supported" if tp_size > groups else ""
        raise UserError(
            f"parallel.tensor_model_parallel_size: {tp_size} does not divide this model's {heads} attention heads, "
            f"{groups} key/value heads and feed-forward size {ffn}{reason}; allowed: {', '.join(map(str, allowed))}"
        )
    stage_layers(config["num_layers"], layout)


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
    """The rules of the parameters that `build_model` would make on one stage; makes none.

    Args:
        architecture: the opened configuration.
        layout: divides the model (see `check_layout`).
        pp_rank: the stage.
    """
    pp_size = layout.pipeline_model_parallel_size
    stages = stage_layers(len(architecture.layers), layout)
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
