"""What a run was made from, by content: a run that resumes may find it at other paths, and must find the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import xxhash

from fusemega.checkpoint.open_model import ModelSource
from fusemega.files.output import on_main
from fusemega.losses.registry import Objective
from fusemega.runtime.parallel import World
from fusemega.text.dataset import TokenizedDataset


def content_of(
    source: ModelSource,
    objective: Objective,
    dataset: TokenizedDataset,
    held_out: TokenizedDataset | None,
    world: World,
) -> dict[str, Any]:
    """The model that training starts from, the samples, and what the objective names (stores, maps, teachers).

    The main process reads all of it, once. Collective; every rank gets the same.

    Raises:
        UserError: something cannot be read; on every rank.
    """
    found: dict[str, Any] = {}

    def read() -> None:
        found["model"] = source.weights_hash()
        found["data"] = samples_hash(dataset)
        found["held_out"] = None if held_out is None else samples_hash(held_out)
        found["objective"] = objective.identity(dataset)

    on_main(world, read)
    return dict(world.from_main(found))


def samples_hash(dataset: TokenizedDataset) -> str:
    """32 hex digits over the samples as they are trained on, in order; the same wherever their text came from."""
    digest = xxhash.xxh3_128()
    for values in dataset.contents():
        digest.update(np.ascontiguousarray(values).view(np.uint8).data)
    return digest.hexdigest()
