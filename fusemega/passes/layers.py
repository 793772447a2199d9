"""Hidden states inside a model, handed out while a pass runs: after any layer, or what one of its blocks reads.

The caller names points, and hooks on the layers of this rank's pipeline stage hand out the states there. Only the ranks
of the stage that has a point's layer get its states, the same on each of its tensor-parallel ranks.

Shape suffixes: T tokens of a micro-batch (of this context-parallel rank), H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from fusemega.models.build import GPT
from fusemega.runtime.parallel import World


@dataclass(frozen=True)
class Point:
    """A place in the residual stream.

    Attributes:
        layer: counted from 0 over the whole model.
        where: "input" is what the layer and its attention block read (before the norm), "mlp_input" what its MLP block
            reads, "output" the stream after the layer: transformers' `hidden_states[layer + 1]`, but for the last
            layer, whose output is here before the final norm.
    """

    layer: int
    where: Literal["input", "mlp_input", "output"] = "output"


@contextmanager
def handed_out(
    gpt: GPT, points: Sequence[Point], hand_out: Callable[[Point, torch.Tensor], None], world: World
) -> Iterator[list[Point]]:
    """Inside the block, each forward pass hands out the states at the points that this rank holds. Yields those points.

    Args:
        hand_out: called once for each micro-batch, in order, with the point and its states [T, H], which are whole
            also under sequence parallelism.

    Raises:
        ValueError: a point's layer is not in the model.
    """
    layers = {layer.layer_number - 1: layer for chunk in gpt.chunks for layer in chunk.decoder.layers}
    if beyond := [point for point in points if not 0 <= point.layer < gpt.config.num_layers]:
        raise ValueError(f"{beyond[0]}: the model has {gpt.config.num_layers} layers, counted from 0")
    held = [point for point in points if point.layer in layers]

    def give(point: Point, hidden_T1H: torch.Tensor) -> None:
        if world.sequence_parallel:
            hidden_T1H = gather_from_sequence_parallel_region(hidden_T1H, group=world.tp_group)
        hand_out(point, hidden_T1H[:, 0])

    with ExitStack() as stack:
        for point in held:
            layer = layers[point.layer]

            # Megatron passes the stream by keyword to a layer, and by position to a norm.
            def before(_: Any, args: Any, kwargs: Any, point: Point = point) -> None:
                give(point, args[0] if args else kwargs["hidden_states"])

            def after(_: Any, __: Any, output: Any, point: Point = point) -> None:
                give(point, output[0] if isinstance(output, tuple) else output)

            if point.where == "output":
                hook = layer.register_forward_hook(after)
            else:
                module = layer if point.where == "input" else layer.pre_mlp_layernorm
                hook = module.register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(hook.remove)
        yield held
