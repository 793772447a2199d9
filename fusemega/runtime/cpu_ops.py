"""RMSNorm, SwiGLU, GeGLU and rotary positions on a CPU, each in one pass over memory for forward and one for backward.

Between the matrix products, memory bandwidth limits a layer: torch reads whole tensors once for each operation, and
autograd keeps every result. Here a block of rows goes through all operations while it is in the cache, and backward
starts from the inputs. Forward does the operations of the plain formula in the same order, so rounding is the same.

Shape suffixes: R rows (tokens, or heads of tokens), B rows of a block, H row size, F feed-forward size, T tokens,
N heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Size of one operand of a block: a few of them fit in the caches. With smaller blocks, calls cost more than they save.
_BLOCK_BYTES = 1 << 20


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in the dtype that both have, fp32 or float64."""
    out: Tensor = _RMSNorm.apply(x, weight_H, eps)
    return out


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., gate F | up F] -> [..., F]."""
    out: Tensor = _GatedUnit.apply(gate_up, False)
    return out


def geglu(gate_up: Tensor) -> Tensor:
    """gelu_tanh(gate) * up of [..., gate F | up F] -> [..., F]."""
    out: Tensor = _GatedUnit.apply(gate_up, True)
    return out


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh formula, on any device; one function, so that a configuration can be asked whether it has it."""
    return F.gelu(x, approximate="tanh")


def rotate(t_TND: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """t * cos + rotate_half(t) * sin, where rotate_half turns (first, second) half of a head into (-second, first).

    Both halves of cos and of sin are the same.
    """
    out: Tensor = _Rotate.apply(t_TND, cos_T1D, sin_T1D)
    return out


def _blocks(rows: int, row: Tensor) -> Iterator[slice]:
    """Cuts `rows` rows, each as large as `row`, into blocks of `_BLOCK_BYTES`."""
    step = max(1, _BLOCK_BYTES // max(1, row.numel() * row.element_size()))
    return (slice(at, at + step) for at in range(0, rows, step))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        x_RH = x.reshape(-1, x.size(-1))
        out_RH, scale_R1 = torch.empty_like(x_RH), x_RH.new_empty(len(x_RH), 1)
        for rows in _blocks(len(x_RH), weight_H):
            x_BH, out_BH, scale_B1 = x_RH[rows], out_RH[rows], scale_R1[rows]
            torch.mul(x_BH, x_BH, out=out_BH)
            torch.mean(out_BH, 1, keepdim=True, out=scale_B1).add_(eps).rsqrt_()
            torch.mul(x_BH, scale_B1, out=out_BH).mul_(weight_H)
        ctx.save_for_backward(x_RH, weight_H, scale_R1)
        return out_RH.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, None]:
        """With n = x * scale, g = d_out * weight: d_x = scale * (g - n * mean(g * n)), d_weight = sum d_out * n."""
        x_RH, weight_H, scale_R1 = ctx.saved_tensors
        d_out_RH = d_out.reshape(x_RH.shape)
        d_x_RH, d_weight_H = torch.empty_like(x_RH), torch.zeros_like(weight_H)
        for rows in _blocks(len(x_RH), weight_H):
            d_out_BH, d_x_BH, scale_B1 = d_out_RH[rows], d_x_RH[rows], scale_R1[rows]
            n_BH = x_RH[rows] * scale_B1
            torch.mul(d_out_BH, n_BH, out=d_x_BH)
            d_weight_H += d_x_BH.sum(0)
            mean_B1 = (d_x_BH @ weight_H).div_(len(weight_H))[:, None]
            torch.mul(d_out_BH, weight_H, out=d_x_BH).sub_(n_BH.mul_(mean_B1)).mul_(scale_B1)
        return d_x_RH.view(d_out.shape), d_weight_H, None


class _GatedUnit(torch.autograd.Function):
    """SiLU of the gate, or GELU by its tanh formula."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, gelu: bool) -> Tensor:
        both_R2F = gate_up.reshape(-1, gate_up.size(-1))
        out_RF = both_R2F.new_empty(len(both_R2F), both_R2F.size(1) // 2)
        for rows in _blocks(len(out_RF), out_RF[:1]):
            gate_BF, up_BF = both_R2F[rows].chunk(2, dim=1)
            _activated(gate_BF, gelu, out_RF[rows]).mul_(up_BF)
        ctx.save_for_backward(both_R2F)
        ctx.gelu = gelu
        return out_RF.view(*gate_up.shape[:-1], out_RF.size(1))  # an expert may have no tokens, and -1 no meaning

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:
        (both_R2F,) = ctx.saved_tensors
        d_both_R2F = torch.empty_like(both_R2F)
        d_out_RF = d_out.reshape(len(both_R2F), both_R2F.size(1) // 2)
        for rows in _blocks(len(d_out_RF), d_out_RF[:1]):
            d_out_BF = d_out_RF[rows]
            gate_BF, up_BF = both_R2F[rows].chunk(2, dim=1)
            d_gate_BF, d_up_BF = d_both_R2F[rows].chunk(2, dim=1)
            _activated(gate_BF, ctx.gelu, d_up_BF).mul_(d_out_BF)
            d_activated = d_out_BF * up_BF
            if ctx.gelu:
                torch.ops.aten.gelu_backward.grad_input(d_activated, gate_BF, approximate="tanh", grad_input=d_gate_BF)
            else:
                torch.ops.aten.silu_backward.grad_input(d_activated, gate_BF, grad_input=d_gate_BF)
        return d_both_R2F.view(*d_out.shape[:-1], both_R2F.size(1)), None


def _activated(gate_BF: Tensor, gelu: bool, out_BF: Tensor) -> Tensor:
    """The activation of the gate, written to `out_BF`."""
    if gelu:
        torch.ops.aten.gelu.out(gate_BF, approximate="tanh", out=out_BF)
    else:
        torch.ops.aten.silu.out(gate_BF, out=out_BF)
    return out_BF


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t_TND: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
        ctx.save_for_backward(cos_T1D, sin_T1D)
        return _rotated(t_TND, cos_T1D, sin_T1D, True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_TND: Tensor) -> tuple[Tensor, None, None]:
        cos_T1D, sin_T1D = ctx.saved_tensors
        return _rotated(d_out_TND, cos_T1D, sin_T1D, False), None, None


def _rotated(t_TND: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, forth: bool) -> Tensor:
    """Rotates by the angles, or back by them if `forth` is false."""
    out_TND = torch.empty(t_TND.shape, dtype=t_TND.dtype, device=t_TND.device)
    for rows in _blocks(len(t_TND), t_TND[:1]):
        torch.mul(t_TND[rows], cos_T1D[rows], out=out_TND[rows])
        first, second = t_TND[rows].chunk(2, dim=2)
        out_first, out_second = out_TND[rows].chunk(2, dim=2)
        sine = sin_T1D[rows].chunk(2, dim=2)[0]
        if forth:
            out_first.sub_(second * sine)
            out_second.add_(first * sine)
        else:
            out_first.add_(second * sine)
            out_second.sub_(first * sine)
    return out_TND
