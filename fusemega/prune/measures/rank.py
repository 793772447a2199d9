"""The order that a measure of one pass gives."""

from __future__ import annotations

from collections.abc import Sequence

from fusemega.prune.measures.angular_distance import contiguous_layers
from fusemega.prune.measures.block_influence import block_influence
from fusemega.prune.measures.random_order import random_order
from fusemega.prune.measures.relative_magnitude import relative_magnitude
from fusemega.prune.measures.streams import Compare, last_states, mean_between
from fusemega.prune.order import ResidualBlock
from fusemega.prune.run_file import PruneRun
from fusemega.prune.stage import CalibrationRow, StageBlocks

COMPARES: dict[str, Compare] = {"block_influence": block_influence, "relative_magnitude": relative_magnitude}


def ranked(run: PruneRun, stage: StageBlocks, rows: Sequence[CalibrationRow]) -> list[ResidualBlock]:
    """The blocks to remove, the least important first. Of a layer that is removed whole, attention comes first.

    Collective; every rank gets the result.
    """
    layers = [tuple(b for b in stage.blocks if b.layer == layer) for layer in range(len(stage.gpt.architecture.layers))]
    if run.measure == "random":
        allowed = [block for block in stage.blocks if run.type in ("mix", block.kind)]
        return random_order(allowed, run.seed)[: run.blocks]
    if run.measure == "angular_distance":
        numbers = contiguous_layers(last_states(stage, rows), run.blocks // 2)
        return [block for number in numbers for block in layers[number]]
    spans: list[tuple[ResidualBlock, ...]]
    if run.whole_layers:
        spans = layers
    else:
        spans = [(block,) for block in stage.blocks if run.type in ("mix", block.kind)]
    found = mean_between(stage, rows, spans, COMPARES[run.measure])
    order = sorted(spans, key=lambda span: (found[span], span))
    return [block for span in order for block in span][: run.blocks]
