"""Finds models whose deltas are mostly rounding error (`fusemega.hf.rounding`).

Methods that weigh models by their deltas (VaRM, SCE) weigh rounding errors then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

LEVEL = 0.75
"""At least this share of zeros and single steps. Changes that are normal with a standard deviation of 1.3 steps have
it; rounding's own deviation, the root of 1/12 of a step, is then 22 % of theirs."""


def shares(counts: Sequence[list[int] | None], elements: int) -> dict[str, list[float | None]]:
    """The report's entry for a tensor, one number for each model: None if it was not counted; empty if no model was.

    Args:
        counts: sums of `steps` for each model.
        elements: number of elements of the tensor.
    """
    if not any(counts):
        return {}
    return {
        "unchanged": [None if found is None else found[0] / elements for found in counts],
        "within_one_step": [None if found is None else sum(found) / elements for found in counts],
    }


def of_models(paths: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same shares for each model whose deltas were counted, over the tensors that it changed.

    A tensor without any change was not trained, and says nothing about rounding.

    Args:
        paths: the models.
        rows: the report's rows, one for each tensor.
    """
    said = []
    for number, path in enumerate(paths):
        counted = [row for row in rows if "unchanged" in row and row["unchanged"][number] is not None]
        trained = [row for row in counted if row["unchanged"][number] < 1]
        if trained:
            sizes = [math.prod(row["shape"]) for row in trained]
            found = {
                key: math.fsum(row[key][number] * size for row, size in zip(trained, sizes, strict=True)) / sum(sizes)
                for key in ("unchanged", "within_one_step")
            }
            said.append({"model": path, **found, "at_rounding_level": found["within_one_step"] >= LEVEL})
    return said


def warnings(said: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each model whose deltas are at the level of rounding."""
    return [
        f"{one['model']}: its deltas are at the level of rounding: {one['unchanged']:.1%} of the elements are the "
        f"base's, and {one['within_one_step']:.1%} that or the next number of their type; if a run of yours made it, "
        "export it with training.export_dtype: fp32"
        for one in said
        if one["at_rounding_level"]
    ]
