"""Weights in another type: rounded to nearest even, and refused where a number would become infinite."""

from __future__ import annotations

import torch

from fusemega.errors import UserError


def narrowed(values: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """`values` of tensor `name` in `dtype`. Infinities and NaN that are there already stay.

    Raises:
        UserError: a finite number lies beyond what `dtype` holds (65504 for float16).
    """
    out = values.to(dtype)
    if out.dtype == values.dtype or torch.finfo(dtype).max >= torch.finfo(values.dtype).max:
        return out
    if not torch.isfinite(out.sum()):  # one pass; which element, only where there is one
        lost = torch.isfinite(values) & ~torch.isfinite(out)
        if lost.any():
            most = torch.finfo(dtype).max
            raise UserError(
                f"tensor {name}: holds {float(values[lost].flatten()[0]):g}, too large for {str(dtype)[6:]} "
                f"(at most {most:g}); allowed: a wider type, such as bfloat16 or float32"
            )
    return out
