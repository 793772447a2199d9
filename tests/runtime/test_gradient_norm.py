"""The gradients' norm and their clipping where no GPU package brings them."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads, optimizer

from fusemega.runtime import gradient_norm
from fusemega.runtime.parallel import ParallelConfig, initialize

BUFFER = torch.zeros(1, dtype=torch.int)


def gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for shape in ((7, 5), (3,), (11, 2, 2))]


def test_the_norm_is_that_of_one_vector() -> None:
    total = sum(float(value) ** 2 for each in gradients() for value in each.double().flatten())
    norm, none = gradient_norm.l2_norm(0, BUFFER, [gradients()], False)
    assert norm.shape == (1,) and norm.dtype == torch.float32 and none is None
    torch.testing.assert_close(norm.double(), torch.tensor([total]).double().sqrt(), rtol=1e-6, atol=0)
    # To the bit what megatron-core would have given.
    assert torch.equal(norm, utils.local_multi_tensor_l2_norm(0, BUFFER, [gradients()], False)[0])


def test_scaling_and_copying() -> None:
    wanted = gradients()
    utils.local_multi_tensor_scale(0, BUFFER, [wanted, wanted], 0.3)
    for factor, expected in ((0.3, wanted), (1.0, gradients())):
        own, other = gradients(), [torch.zeros_like(each) for each in gradients()]
        gradient_norm.scale(0, BUFFER, [own, other], factor)
        assert all(map(torch.equal, other, expected)) and all(map(torch.equal, own, gradients()))
        gradient_norm.scale(0, BUFFER, [own, own], factor)
        assert all(map(torch.equal, own, expected))
    gradient_norm.scale(0, BUFFER, [[], []], 0.3)


def test_megatron_uses_them(monkeypatch: Any) -> None:
    """Once, and not where a package has brought its own."""
    initialize(ParallelConfig())
    for module in (clip_grads, optimizer):
        assert module.multi_tensor_scale_impl is gradient_norm.scale
    assert clip_grads.l2_norm_impl is gradient_norm.l2_norm
    monkeypatch.setattr(clip_grads, "l2_norm_impl", len)
    gradient_norm.install()
    assert clip_grads.l2_norm_impl is len
