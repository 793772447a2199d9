"""The gradients' norm and their clipping, where neither Transformer Engine nor apex is.

megatron-core then takes the norm of one gradient after the other and reads each from the device (utils.py:1206), so the
host waits once for every parameter in every step; and clipping makes a copy of every gradient (utils.py:1215). Here
all gradients go together, and nothing is read. The operations and their rounding are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def l2_norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Sequence[Sequence[Tensor]], per_tensor: bool
) -> tuple[Tensor, None]:
    """fp32 [1], on their device: the norm of all tensors of the one list (at least one), as of one vector.

    The signature is that of apex's `multi_tensor_l2norm`.

    Example:
        >>> l2_norm(0, torch.zeros(1), [[torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]], False)
        (tensor([5.]), None)
    """
    (tensors,) = tensor_lists
    norms = torch.stack(torch._foreach_norm(list(tensors)))
    return torch.linalg.vector_norm(norms, dtype=torch.float32)[None], None


def scale(chunk_size: int, noop_flag: Tensor, tensor_lists: Sequence[Sequence[Tensor]], factor: float) -> None:
    """Each tensor of the second list becomes that of the first times `factor`; the lists may be the same.

    The signature is that of apex's `multi_tensor_scale`.
    """
    sources, targets = (list(tensors) for tensors in tensor_lists)
    if not sources:
        return
    if any(source is not target for source, target in zip(sources, targets, strict=True)):
        torch._foreach_copy_(targets, sources)
    if factor != 1.0:
        torch._foreach_mul_(targets, factor)


def install() -> None:
    """Puts both into megatron-core's optimizers, in this process, unless a package brings them. Idempotent."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer

    norms: Any = clip_grads
    if norms.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        norms.l2_norm_impl = l2_norm
    for module in (clip_grads, optimizer):
        patched: Any = module
        if patched.multi_tensor_scale_impl is utils.local_multi_tensor_scale:
            patched.multi_tensor_scale_impl = scale
