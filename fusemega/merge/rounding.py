"""Finds deltas that are mostly rounding error: most of a model's elements equal the base's or differ by one step.

A bf16 file holds eight bits of each weight. An update smaller than half of the last bit is lost, and an update of about
that size is mostly rounding. Methods that weigh models by their deltas (VaRM, SCE) then weigh rounding errors.

Shape suffixes: n elements of one block, flat.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

LEVEL = 0.75
"""At least this share of zeros and single steps. Changes that are normal with a standard deviation of 1.3 steps have
it; rounding's own deviation, the root of 1/12 of a step, is then 22 % of theirs."""


def steps(base_n: torch.Tensor, model_n: torch.Tensor) -> tuple[int, int]:
    """How many elements of a 16-bit model equal the base's, rounded to its type, and how many are one step beside.

    Numbers of one sign and type are in the order of their bits, taken as integers. (Of two signs, only zeros and the
    smallest are neighbours; those do not count.)
    """
    # numpy counts four times as fast.
    apart_n = model_n.view(torch.int16).numpy() - base_n.to(model_n.dtype).view(torch.int16).numpy()
    equal = int(np.count_nonzero(apart_n == 0))
    # Differences of -1, 0 and 1 become 0, 1 and 2; read as unsigned, all others are larger.
    apart_n += 1
    return equal, int(np.count_nonzero(apart_n.view(np.uint16) <= 2)) - equal


def is_counted(dtype: torch.dtype) -> bool:
    """Whether steps are counted for a type; in wider types, a step is smaller than any update."""
    return dtype in (torch.bfloat16, torch.float16)


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
