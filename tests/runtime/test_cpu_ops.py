"""The fused CPU operations against the plain formulas, by autograd: forward bit for bit, gradients in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusemega.runtime import cpu_backend, cpu_ops
from fusemega.runtime import rope as packed_rope

EPS = 1e-5


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def plain_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def plain_geglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return cpu_ops.gelu_tanh(gate) * up


def plain_rotate(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = t.chunk(2, -1)
    return t * cos + torch.cat((-second, first), -1) * sin


def angles(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    half = torch.randn(tokens, 1, 4, dtype=torch.float64)
    both = torch.cat((half, half), -1)
    return both.cos().to(dtype), both.sin().to(dtype)


def inputs(name: str, dtype: torch.dtype) -> list[Tensor]:
    """Of 11 tokens, some of them views that are not contiguous."""
    torch.manual_seed(0)
    if name == "norm":
        return [torch.randn(11, 2, 24, dtype=dtype)[..., :16], torch.randn(16, dtype=dtype)]
    if name in ("swiglu", "geglu"):
        return [torch.randn(11, 1, 12, dtype=dtype)]
    return [torch.randn(11, 3, 20, dtype=dtype)[..., 4:12], *angles(11, dtype)]


OPS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "norm": (lambda x, weight: cpu_ops.rms_norm(x, weight, EPS), plain_norm),
    "swiglu": (cpu_ops.swiglu, plain_swiglu),
    "geglu": (cpu_ops.geglu, plain_geglu),
    "rotate": (cpu_ops.rotate, plain_rotate),
}


@pytest.fixture(params=[1, 300, 1 << 20], autouse=True)
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One row a block, a few with a smaller last one, all in one."""
    monkeypatch.setattr(cpu_ops, "_BLOCK_BYTES", request.param)
    yield


@pytest.mark.parametrize("name", OPS)
def test_forward_rounds_as_the_plain_formula(name: str) -> None:
    ours, plain = OPS[name]
    given = inputs(name, torch.float32)
    assert torch.equal(ours(*given), plain(*given))


@pytest.mark.parametrize("name", OPS)
def test_gradients_are_those_of_the_plain_formula(name: str) -> None:
    ours, plain = OPS[name]
    given = inputs(name, torch.float64)
    learned = [t.requires_grad_() for t in (given[:2] if name == "norm" else given[:1])]
    out, expected = ours(*given), plain(*given)
    torch.testing.assert_close(out, expected, rtol=1e-14, atol=1e-14)
    upstream = torch.randn(out.shape, dtype=out.dtype).transpose(0, 1).contiguous().transpose(0, 1)
    found = torch.autograd.grad(out, learned, upstream)
    for got, wanted in zip(found, torch.autograd.grad(expected, learned, upstream), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["swiglu", "geglu"])
def test_gated_units_in_bf16_round_as_autograd_does(name: str) -> None:
    ours_of, plain = OPS[name]
    gate_up = inputs(name, torch.float32)[0].bfloat16().requires_grad_()
    out, expected = ours_of(gate_up), plain(gate_up)
    assert torch.equal(out, expected)
    upstream = torch.randn(out.shape).bfloat16()
    ours, wanted = (torch.autograd.grad(o, gate_up, upstream)[0] for o in (out, expected))
    assert torch.equal(ours, wanted)


class _Rank:
    """One of several context-parallel ranks."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = lambda: rank, lambda: size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_packed_rope_is_megatrons(
    dtype: torch.dtype, place: tuple[int, int], on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several rows in turn through one `PackedRope`: the angles kept are those of the row at hand."""
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer import attention

    from fusemega.runtime.parallel import ParallelConfig, initialize

    initialize(ParallelConfig())
    rope: Any = attention.apply_rotary_pos_emb
    assert isinstance(rope, packed_rope.PackedRope)
    if on_gpu:
        monkeypatch.setattr(cpu_ops, "rotate", packed_rope._rotate)
    group = _Rank(*place)
    config = SimpleNamespace(rotary_interleaved=False, apply_rope_fusion=False, multi_latent_attention=False)
    half = torch.randn(40, 1, 1, 4)
    freqs = torch.cat((half, half), -1)
    for lengths in ([5, 1, 7], [13], [6, 7], [5, 1, 7]) if place[1] == 1 else ([8, 4, 16], [28], [12, 16]):
        cu = torch.tensor([0, *lengths]).cumsum(0).int()
        for heads in (3, 2):
            t = torch.randn(sum(lengths) // place[1], heads, 8, dtype=torch.float32).to(dtype).requires_grad_()
            out = rope(t, freqs, config, cu_seqlens=cu, cp_group=group)
            expected = rope_utils.apply_rotary_pos_emb(t, freqs, config, cu_seqlens=cu, cp_group=group)
            assert torch.equal(out, expected)
            upstream = torch.randn(out.shape).to(dtype)
            ours, wanted = (torch.autograd.grad(o, t, upstream)[0] for o in (out, expected))
            torch.testing.assert_close(ours, wanted)
    scaled = rope(t, freqs, config, cu_seqlens=cu, mscale=2.0, cp_group=group)
    megatrons = rope_utils.apply_rotary_pos_emb(t, freqs, config, cu_seqlens=cu, mscale=2.0, cp_group=group)
    assert torch.equal(scaled, megatrons)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradients_are_added_to_the_main_gradient(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, d_out, main = torch.randn(7, 5).to(dtype), torch.randn(7, 3).to(dtype), torch.randn(3, 5)
    expected = main.double() + d_out.double().t() @ x.double()
    cpu_backend._WeightGradients.wgrad_gemm_accum_fp32(x, d_out, main)
    tolerance = 1e-6 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(main.double(), expected, rtol=tolerance, atol=tolerance)


def test_linear_layers_of_a_wrapped_model_add_as_they_multiply() -> None:
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer import TransformerConfig

    from fusemega.runtime.parallel import ParallelConfig, initialize

    initialize(ParallelConfig())
    torch.manual_seed(0)
    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1, use_cpu_initialization=True)
    layer = ColumnParallelLinear(4, 6, config=config, init_method=torch.nn.init.normal_, bias=False)
    x, weight = torch.randn(5, 1, 4), layer.weight
    (wanted,) = torch.autograd.grad(layer(x)[0].square().sum(), weight)
    cpu_backend.fuse_gradient_accumulation(layer)
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones_like(weight), False
    for _ in range(2):
        layer(x)[0].square().sum().backward()
        weight.grad = None  # as DistributedDataParallel does, without a look at it
    assert weight.grad_added_to_main_grad
    torch.testing.assert_close(weight.main_grad, 1 + 2 * wanted)
