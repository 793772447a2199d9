"""What the removal of blocks saves: parameters, bytes of weights, and bytes of the key/value cache."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from fusemega.models.architecture import Architecture
from fusemega.models.parts import Names
from fusemega.prune.order import ResidualBlock


@dataclass(frozen=True)
class Size:
    """Of a model, or of some of its blocks.

    Attributes:
        parameters: how many; a tied head counts once.
        kv_values: numbers that the key/value cache has for each token of a text.
    """

    parameters: int
    kv_values: int


def size_of(architecture: Architecture) -> Size:
    """Of the whole model."""
    attentions = [layer.attention for layer in architecture.layers if layer.attention is not None]
    return Size(
        sum(math.prod(shape) for shape in architecture.hf_shapes().values()),
        sum(2 * attention.groups * attention.head_dim for attention in attentions),
    )


def size_of_blocks(architecture: Architecture, blocks: Iterable[ResidualBlock]) -> Size:
    """Of some blocks, with their norms.

    Raises:
        ValueError: the model has not one of them.
    """
    parameters = kv_values = 0
    for block in blocks:
        layer = architecture.layers[block.layer]
        part = layer.attention if block.kind == "mha" else layer.mlp
        if part is None:
            raise ValueError(f"no {block} in this model")
        names = Names("", "", "local")
        rules = [*part.rules(names), *(rule for norm in part.norms for rule in norm.rules(names))]
        parameters += sum(math.prod(shape) for rule in rules for shape in rule.hf_shapes().values())
        if block.kind == "mha" and layer.attention is not None:
            kv_values += 2 * layer.attention.groups * layer.attention.head_dim
    return Size(parameters, kv_values)
