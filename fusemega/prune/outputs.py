"""The folder that a search writes: order.json, authors.json, rounds.jsonl, and a page with its picture."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fusemega.models.architecture import Architecture
from fusemega.prune.order import Order
from fusemega.prune.rounds import Round
from fusemega.prune.savings import size_of, size_of_blocks
from fusemega.report.prune_page import PruneStep, write_prune_page


def write_outputs(
    folder: Path,
    order: Order,
    rounds: Sequence[Round],
    architecture: Architecture,
    dtypes: Mapping[str, torch.dtype],
    tokens: int,
) -> None:
    """Makes `folder` and writes everything into it.

    Args:
        rounds: of the search; none of a measure that needs none.
        dtypes: of the model's tensors, for their size.
        tokens: predicted tokens of the calibration data.
    """
    folder.mkdir(exist_ok=True)
    order.write(folder / "order.json")
    order.write_authors(folder / "authors.json")
    lines = [
        {
            "removed": [block.words for block in each.removed],
            "costs": each.costs,
            "candidates": [
                {
                    "blocks": [block.words for block in removal],
                    "cost": found.cost,
                    "rows": found.rows,
                }
                for removal, found in each.candidates.items()
            ],
        }
        for each in rounds
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "rounds.jsonl").write_text(text, encoding="utf-8")
    write_prune_page(
        folder,
        steps_of(order, architecture, dtypes),
        layers=len(architecture.layers),
        facts={
            "model": f"{order.model.family}, {order.model.layers} layers" if order.model else "",
            "measure": order.measure or "",
            **{name: _shown(value) for name, value in order.settings.items() if value is not None},
        },
        tokens=tokens,
    )


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def steps_of(order: Order, architecture: Architecture, dtypes: Mapping[str, torch.dtype]) -> list[PruneStep]:
    """What is left after 0, 1, 2, ... removals."""
    common = Counter(dtypes.values()).most_common(1)[0][0]
    whole, width = size_of(architecture), torch.finfo(common).bits // 8
    values = [order.dense_perplexity, *(step.perplexity for step in order.steps)]
    out = []
    for number, value in enumerate(values):
        gone = size_of_blocks(architecture, order.blocks[:number])
        block = order.blocks[number - 1] if number else None
        parameters, kv = whole.parameters - gone.parameters, whole.kv_values - gone.kv_values
        out.append(
            PruneStep(
                kind=block.kind if block else "",
                layer=block.layer if block else -1,
                perplexity=value,
                parameters=parameters,
                weight_bytes=parameters * width,
                kv_bytes=kv * width,
            )
        )
    return out
