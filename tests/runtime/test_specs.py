"""Layer specs without Transformer Engine, against plain formulas."""

from __future__ import annotations

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from fusemega.runtime import specs
from fusemega.runtime.specs import RMSNorm, SDPAttention

T, N, G, D = 13, 6, 2, 8


def config(**changes: object) -> TransformerConfig:
    base = {"num_layers": 1, "hidden_size": N * D, "num_attention_heads": N, "num_query_groups": G}
    return TransformerConfig(**{**base, "attention_dropout": 0.0, "use_cpu_initialization": True, **changes})


def attention(layer: int = 1, softcap: float | None = None, **changes: object) -> SDPAttention:
    return SDPAttention(config(**changes), layer, AttnMaskType.causal, "self", softcap=softcap).double()


def plain_attention(
    q_TND: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    before: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Loops over positions and heads; a query sees `before` tokens before itself, or all."""
    out = torch.zeros_like(q_TND)
    for t in range(q_TND.size(0)):
        for n in range(q_TND.size(1)):
            g = n // (q_TND.size(1) // k_TGD.size(1))
            first = 0 if before is None else max(0, t - before)
            scores = torch.stack([q_TND[t, n] @ k_TGD[s, g] for s in range(first, t + 1)]) / q_TND.size(2) ** 0.5
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            out[t, n] = scores.softmax(0) @ v_TGD[first : t + 1, g]
    return out.flatten(1)


def assert_same_with_gradients(out: torch.Tensor, expected: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> None:
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(out)
    got, wanted = (torch.autograd.grad((o * weight).sum(), inputs) for o in (out, expected))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(T, heads, D, generator=generator, dtype=torch.float64) for heads in (N, G, G))  # type: ignore[return-value]


def test_dense_rows_equal_plain_loops() -> None:
    q, k, v = qkv()
    out = attention()(q[:, None], k[:, None], v[:, None], None)
    torch.testing.assert_close(out[:, 0], plain_attention(q, k, v), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [[13], [1, 12], [5, 1, 7], [4, 4, 4, 1]])
def test_packed_segments_do_not_see_each_other(lengths: list[int]) -> None:
    q, k, v = qkv()
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=max(lengths))
    out = attention()(q, k, v, None, packed_seq_params=packed)
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    expected = torch.cat([plain_attention(*part) for part in parts])
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("before", [0, 1, 4, 11, 12, 30])
@pytest.mark.parametrize("block", [1, 5, 512])
@pytest.mark.parametrize("lengths", [[13], [1, 12], [5, 8]])
def test_a_sliding_window_equals_plain_loops(
    monkeypatch: pytest.MonkeyPatch, before: int, block: int, lengths: list[int]
) -> None:
    monkeypatch.setattr(specs, "_BLOCK", block)
    q, k, v = (t.requires_grad_() for t in qkv())
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=max(lengths))
    windowed = attention(window_size=(before, 0))
    out = windowed(q, k, v, None, packed_seq_params=packed)
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    expected = torch.cat([plain_attention(*part, before=before) for part in parts])
    assert_same_with_gradients(out, expected, (q, k, v))
    if len(lengths) == 1:
        dense = windowed(q[:, None], k[:, None], v[:, None], None)
        torch.testing.assert_close(dense[:, 0], expected, rtol=1e-12, atol=1e-12)


def test_a_window_holds_in_the_layers_that_ask_for_it() -> None:
    changes = {"window_size": (4, 0), "window_attn_skip_freq": [0, 1, 0]}
    assert [attention(layer, **changes).window for layer in (1, 2, 3)] == [None, 4, None]
    with pytest.raises(ValueError, match=r"\(4, 2\) is not"):
        attention(window_size=(4, 2))


def test_a_mask_is_refused_rather_than_ignored() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match="no mask"):
        attention()(q[:, None], k[:, None], v[:, None], torch.zeros(1, 1, T, T, dtype=torch.bool))
    with pytest.raises(ValueError, match="causal"):
        SDPAttention(config(), 1, AttnMaskType.no_mask, "self")


def test_zero_centered_norms_scale_by_one_more_and_round_once() -> None:
    settings = config(layernorm_zero_centered_gamma=True, params_dtype=torch.float64)
    norm = RMSNorm(settings, 8, eps=1e-3)
    torch.manual_seed(0)
    norm.weight.data.normal_()
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * (1 + norm.weight)
    assert_same_with_gradients(norm(x), expected, (x, norm.weight))
    narrow = norm.bfloat16()(x.bfloat16())
    wide = x.bfloat16().double()
    exact = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * (1 + norm.weight.double())
    assert torch.equal(narrow, exact.float().bfloat16())


def test_rmsnorm_formula_and_sequence_parallel_mark() -> None:
    norm = RMSNorm(config(), 8, eps=1e-3)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    norm.weight.data.uniform_(0.5, 2)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
    assert norm.weight.sequence_parallel is False
    parallel = config(sequence_parallel=True, tensor_model_parallel_size=2)
    assert RMSNorm(parallel, 8).weight.sequence_parallel is True
