"""Plain torch in place of the compiled functions that a Llama-shaped model calls outside its FP8 products.

Signatures are those of `transformer_engine_torch` 2.11. Shapes: N rows, H hidden; T tokens of a packed row, B segments
of it, S the longest, A heads, D head size.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import torch

__all__ = [
    "NVTE_Fused_Attn_Backend",
    "convert_bshd_to_thd",
    "convert_thd_to_bshd",
    "generic_gemm",
    "get_cudnn_version",
    "get_fused_attn_backend",
    "get_num_cublas_streams",
    "multi_tensor_l2norm",
    "multi_tensor_scale",
    "rmsnorm_bwd",
    "rmsnorm_fwd",
    "te_general_grouped_gemm",
]


class NVTE_Fused_Attn_Backend(enum.IntEnum):  # noqa: N801  (the extension's name)
    """cuDNN's attention kernels."""

    NVTE_No_Backend = -1
    NVTE_F16_max512_seqlen = 0
    NVTE_F16_arbitrary_seqlen = 1
    NVTE_FP8 = 2


def get_fused_attn_backend(*_: Any) -> NVTE_Fused_Attn_Backend:
    """None of them: attention is Transformer Engine's own unfused torch code."""
    return NVTE_Fused_Attn_Backend.NVTE_No_Backend


def get_cudnn_version() -> int:
    """That of cuDNN 9.24, as the library encodes it."""
    return 92400


def get_num_cublas_streams() -> int:
    """One workspace is asked for, and none is used."""
    return 1


def rmsnorm_fwd(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: Any, quantizer: Any, dtype: Any, sm_margin: int, zero: bool
) -> tuple[Any, None, torch.Tensor]:
    """(x_NH / rms * weight, quantized where a quantizer is given; None; 1 / rms [N])."""
    x32 = x.float()
    rstdev_N = torch.rsqrt(x32.pow(2).mean(-1) + eps)
    y = (x32 * rstdev_N[..., None] * (weight.float() + zero)).to(x.dtype)
    return (y if quantizer is None else quantizer.quantize(y)), None, rstdev_N


def rmsnorm_bwd(
    grad: torch.Tensor, x: torch.Tensor, rstdev: torch.Tensor, weight: torch.Tensor, sm_margin: int, zero: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and weight."""
    grad32, x32, rstdev_N1 = grad.float().reshape(x.shape), x.float(), rstdev.reshape(x.shape[:-1])[..., None]
    normed = x32 * rstdev_N1
    scaled = grad32 * (weight.float() + zero)
    grad_x = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * rstdev_N1
    return grad_x.to(x.dtype), (grad32 * normed).reshape(-1, x.size(-1)).sum(0).to(weight.dtype)


def generic_gemm(
    a: torch.Tensor,
    transpose_a: bool,
    b: torch.Tensor,
    transpose_b: bool,
    out: torch.Tensor | None,
    quantizer: object,
    dtype: object,
    bias: torch.Tensor | None,
    bias_dtype: object,
    gelu: bool,
    gelu_input: object,
    backward: bool,
    *rest: Any,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
    """(b @ a in the row-major sense, either transposed; gradient of the bias; None twice), for plain tensors.

    A bias is added forward; backward, where b is the output's gradient, it asks for its own.
    """
    if quantizer is not None or gelu:
        raise RuntimeError("this product needs the compiled extension")
    a2, b2 = a.flatten(0, -2), b.flatten(0, -2)
    product = (b2.T if transpose_b else b2) @ (a2.T if transpose_a else a2)
    if not transpose_b:
        product = product.unflatten(0, b.shape[:-1])
    if bias is not None and not backward:
        product += bias
    bias_grad = b2.sum(0) if bias is not None and backward else None
    return (product if out is None else out.copy_(product)), bias_grad, None, None


def te_general_grouped_gemm(
    a: Sequence[torch.Tensor],
    transpose_a: bool,
    b: Sequence[torch.Tensor],
    transpose_b: bool,
    out: Sequence[torch.Tensor],
    out_dtype: object,
    rows: Sequence[int],
    bias: Sequence[torch.Tensor],
    bias_dtype: object,
    single_output: bool,
    *rest: Any,
) -> Sequence[torch.Tensor]:
    """`generic_gemm` of each pair, into `out`; where that is one tensor, below each other. No bias."""
    grad, accumulate = rest[1], rest[4]
    if accumulate or any(part.numel() for part in bias):
        raise RuntimeError("this grouped product needs the compiled extension")
    outs = out[0].split(list(rows)) if single_output else out
    for left, right, into in zip(a, b, outs, strict=True):
        generic_gemm(left, transpose_a, right, transpose_b, into, None, None, None, None, False, None, grad)
    return bias


def convert_thd_to_bshd(
    packed_TAD: torch.Tensor, cu_seqlens: torch.Tensor, batch_size: int, max_seqlen: int
) -> torch.Tensor:
    """[B, S, A, D]: each segment in a row of its own, zero behind its end."""
    out = packed_TAD.new_zeros((batch_size, max_seqlen, *packed_TAD.shape[1:]))
    for b, segment in enumerate(packed_TAD.split(cu_seqlens.diff().tolist())):
        out[b, : len(segment)] = segment
    return out


def convert_bshd_to_thd(padded_BSAD: torch.Tensor, cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """[T, A, D]: the way back."""
    lengths = cu_seqlens.diff().tolist()
    return torch.cat([row[:length] for row, length in zip(padded_BSAD, lengths, strict=True)])


def multi_tensor_l2norm(
    chunk_size: int, overflow: torch.Tensor, tensor_lists: Sequence[Sequence[torch.Tensor]], per_tensor: bool
) -> tuple[torch.Tensor, None]:
    """([1]: the norm of all tensors together, None)."""
    return torch.stack([tensor.float().norm() for tensor in tensor_lists[0]]).norm().reshape(1), None


def multi_tensor_scale(
    chunk_size: int, overflow: torch.Tensor, tensor_lists: Sequence[Sequence[torch.Tensor]], scale: float
) -> None:
    """Second list = first list * scale, in place."""
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source * scale)
