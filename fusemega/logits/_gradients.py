"""d_hidden and d_weight of one call of the vocabulary head, kept from the forward to the backward pass.

Shape suffixes: T tokens of the call, H hidden size, V this rank's vocabulary rows, padding included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Gradients:
    """Both gradients of one call, to which each chunk adds its part; a gradient that is not wanted is None.

    Args:
        hidden_TH, weight_VH: the call's inputs.
        dtype: dtype of the arithmetic, in which the gradients are summed.
        blocks: the real rows of the weight, block by block.
        wanted: whether d_hidden and d_weight are wanted.
    """

    def __init__(
        self,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        dtype: torch.dtype,
        blocks: Sequence[slice],
        wanted: tuple[bool, bool],
    ) -> None:
        self._dtype = hidden_TH.dtype
        self.d_hidden_TH = torch.zeros_like(hidden_TH, dtype=dtype) if wanted[0] else None
        self.d_weight = WeightGradient(weight_VH, dtype, blocks) if wanted[1] else None
        self._given = False

    def give(self, scale: Tensor | float) -> tuple[Tensor | None, Tensor | None]:
        """The gradients times `scale`, in the inputs' dtypes; this object is used up.

        Raises:
            RuntimeError: called a second time.
        """
        if self._given:
            raise RuntimeError("backward a second time; the gradients were given away the first time")
        self._given = True
        d_hidden_TH, d_weight = self.d_hidden_TH, self.d_weight
        self.d_hidden_TH = self.d_weight = None
        return (
            None if d_hidden_TH is None else d_hidden_TH.mul_(scale).to(self._dtype),
            None if d_weight is None else d_weight.finish(scale),
        )


class WeightGradient:
    """d_weight of a whole call, accumulated in the arithmetic's dtype.

    For low-precision weights the sum is held as separate blocks, which `finish` frees one by one while it fills
    the returned gradient, so the two are never in memory whole at the same time.
    """

    def __init__(self, weight_VH: Tensor, dtype: torch.dtype, blocks: Sequence[slice]) -> None:
        self._like = weight_VH.detach()
        self._slices = blocks
        self._whole: Tensor | None = None
        if dtype == weight_VH.dtype:
            self._whole = torch.zeros_like(self._like)
            self.blocks = [self._whole[block] for block in blocks]
        else:
            self.blocks = [torch.zeros_like(self._like[block], dtype=dtype) for block in blocks]

    def finish(self, scale: Tensor | float) -> Tensor:
        """The gradient times `scale`, in the weight's dtype, 0 in padding rows; this object is used up."""
        if self._whole is not None:
            self.blocks.clear()
            return self._whole.mul_(scale)
        grad_VH = torch.empty_like(self._like)
        # From the last block, so that `pop` frees each one after it is copied.
        for block in reversed(self._slices):
            grad_VH[block].copy_(self.blocks.pop().mul_(scale))
        grad_VH[self._slices[-1].stop if self._slices else 0 :].zero_()
        return grad_VH
