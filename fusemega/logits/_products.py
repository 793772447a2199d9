"""Matrix products of the vocabulary head, whose results are never narrower than fp32.

A product of bf16 matrices is summed in fp32 and by default rounded to bf16. For logits of 20 the error would be up to
0.06: enough to change which ids are the ten most probable. On CUDA torch can return the fp32 sum (`out_dtype`, torch
2.8 and later). Otherwise the operands are widened first, which is equally exact and slower.

Shape suffixes: any [m, k], [k, n].
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fusemega.runtime.console import say


def operand_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which products take tensors of `dtype` on `device`: their own, or a wider one."""
    wide = torch.promote_types(dtype, torch.float32)
    # bf16 products are several times slower than fp32 ones on CPUs without AMX, so there they are always widened.
    if wide == dtype or device.type == "cpu":
        return wide
    return dtype if _narrow_problem(dtype, device) is None else wide


def put_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out = left @ right, where `out` is of the arithmetic's dtype and the operands of `operand_dtype`."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, where `total` is of the arithmetic's dtype. One pass over `total`, and no copy of it."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


@lru_cache
def _narrow_problem(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why fp32 products of `dtype` are not available on `device`, reported once; None if they are."""
    try:
        ones = torch.ones(16, 16, dtype=dtype, device=device)
        total = torch.zeros(16, 32, device=device)
        put_product(total[:, :16], ones, ones)
        add_product(total[:, :16], ones, ones)
        right = (total[:, :16] == 32).all() & (total[:, 16:] == 0).all()
        torch._assert_async(right, f"{device} gives wrong fp32 products of {dtype}")
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        say(f"the head multiplies in fp32, more slowly: {device} gives no fp32 products of {dtype} ({reason})")
        return reason
    return None
