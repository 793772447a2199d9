"""Finds weights of 16 bits that are mostly rounding error: most elements equal those before, or differ by one step.

A bf16 file holds eight bits of each weight. An update smaller than half of the last bit is lost, and an update of about
that size is mostly rounding.

Shape suffixes: n elements of one block, flat.
"""

from __future__ import annotations

import numpy as np
import torch

from fusemega.hf.folder import HFFolder

_MATRICES = 16  # that `unchanged` looks at, about
LOST = 0.9
"""Where at least this share of a trained model's weights are as before, rounding has taken much of the training back.
Of SmolLM2 after 15 updates of DPO with 5e-6, 0.977 were unchanged in bf16, and 0.05 of the update was left (as its
projection); after 30 updates 0.967 and 0.07. Of normal changes that leave 0.9, two thirds would be left."""


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


def unchanged(before: HFFolder, after: HFFolder, elements: int = 1 << 24) -> float | None:
    """The share of a trained model's 16-bit weights that equal those before, by matrices of some of its layers.

    Args:
        before: the model before the training.
        after: a folder of the same names and shapes.
        elements: how many are looked at, from matrices all over the model. A matrix without any change was not trained.

    Returns:
        None if nothing in 16 bits has changed.
    """
    names = [
        name
        for name in after
        if ".layers." in name
        and len(after.shape(name)) == 2
        and is_counted(after.dtype(name))
        and name in before
        and before.shape(name) == after.shape(name)
    ]
    some = names[:: max(1, len(names) // _MATRICES)]
    equal = total = 0
    for name in some:
        rows, columns = after.shape(name)
        box = ((0, min(rows, max(1, elements // len(some) // columns))), (0, columns))
        found, _ = steps(before.read(name, box).flatten(), after.read(name, box).flatten())
        count = box[0][1] * columns
        if found < count:
            equal, total = equal + found, total + count
    return equal / total if total else None
