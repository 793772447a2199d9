"""Weights in another dtype: rounded to nearest even, and refused if a number would become infinite."""

from __future__ import annotations

import torch

from fusemega.errors import UserError


def narrowed(values: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """`values` of tensor `name` in `dtype`. Infinities and NaN in `values` stay.

    Raises:
        UserError: a finite number is too large for `dtype` (at most 65504 for float16).

    >>> narrowed(torch.tensor([1.0, 65504.0]), torch.float16, "lm_head.weight").tolist()
    [1.0, 65504.0]
    >>> narrowed(torch.tensor([1e5]), torch.float16, "lm_head.weight")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    fusemega.errors.UserError: tensor lm_head.weight: holds 100000, too large for float16 (at most 65504); ...
    """
    out = values.to(dtype)
    if out.dtype == values.dtype or torch.finfo(dtype).max >= torch.finfo(values.dtype).max:
        return out
    if not torch.isfinite(out.sum()):  # one pass; the element is searched only if there is one
        lost = torch.isfinite(values) & ~torch.isfinite(out)
        if lost.any():
            most = torch.finfo(dtype).max
            raise UserError(
                f"tensor {name}: holds {float(values[lost].flatten()[0]):g}, too large for {str(dtype)[6:]} "
                f"(at most {most:g}); allowed: a wider type, such as bfloat16 or float32"
            )
    return out
