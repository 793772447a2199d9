"""Attention with capped scores against plain loops in float64: whole, packed, windowed, shared and split rows."""

from __future__ import annotations

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType

from fusemega.runtime import specs
from fusemega.runtime.context_parallel import zigzag
from fusemega.runtime.segments import Segments, known
from fusemega.runtime.specs import SDPAttention
from tests.runtime import test_context_parallel as split
from tests.runtime.test_shared_prompts import BOUNDS, PREFIXES, packed, row
from tests.runtime.test_specs import D, T, assert_same_with_gradients, attention, config, plain_attention, qkv

CAP = 0.7  # of scores of about 1: all are bent


@pytest.mark.parametrize("before", [None, 4])
@pytest.mark.parametrize("block", [5, 512])
@pytest.mark.parametrize("lengths", [[13], [1, 5, 7], [4, 4, 5]])
def test_packed_and_windowed_rows(
    monkeypatch: pytest.MonkeyPatch, before: int | None, block: int, lengths: list[int]
) -> None:
    monkeypatch.setattr(specs, "_BLOCK", block)
    q, k, v = (t.requires_grad_() for t in qkv())
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=max(lengths))
    capped = attention(softcap=CAP, **({} if before is None else {"window_size": (before, 0)}))
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    expected = torch.cat([plain_attention(*part, before=before, softcap=CAP) for part in parts])
    assert_same_with_gradients(capped(q, k, v, None, packed_seq_params=params), expected, (q, k, v))
    assert not torch.allclose(expected, torch.cat([plain_attention(q, k, v, before)]), atol=0.01)
    if len(lengths) == 1:
        torch.testing.assert_close(capped(q[:, None], k[:, None], v[:, None], None)[:, 0], expected)


def test_rows_with_shared_prompts_and_a_scale() -> None:
    q, k, v = row(BOUNDS[-1])
    out = attention(softcap=CAP)(q, k, v, None, packed_seq_params=packed(BOUNDS, PREFIXES))
    parts = []
    for (start, end), (first, last) in zip(zip(BOUNDS, BOUNDS[1:], strict=False), PREFIXES, strict=True):
        places = [*range(first, last), *range(start, end)]
        parts.append(plain_attention(q[places], k[places], v[places], softcap=CAP)[last - first :])
    assert_same_with_gradients(out, torch.cat(parts), (q, k, v))
    scaled = SDPAttention(config(), 1, AttnMaskType.causal, "self", softmax_scale=0.25, softcap=CAP)
    found = scaled(q[:, None], k[:, None], v[:, None], None)[:, 0]
    torch.testing.assert_close(found, plain_attention(q * 0.25 * D**0.5, k, v, softcap=CAP))


def test_rows_that_context_parallel_ranks_share(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [12, 4, 8]
    q, k, v = row(sum(lengths))
    monkeypatch.setattr(specs, "gather_row", lambda part, order, group: torch.stack([k, v], dim=1))
    bounds = (0, 12, 16, 24)
    params = packed(bounds, ((0, 0),) * 3)
    mine = [zigzag(params.cu_seqlens_q, rank, 2) for rank in range(2)]
    parts = []
    for rank, places in enumerate(mine):
        capped = split.attention(rank, 2, softcap=CAP)
        parts.append(capped(q[places], k[places], v[places], None, packed_seq_params=params))
    out = torch.cat(parts)[torch.cat(mine).argsort()]
    texts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    expected = torch.cat([plain_attention(*text, softcap=CAP) for text in texts])
    assert_same_with_gradients(out, expected, (q, k, v))


def test_bf16_scores_are_not_rounded() -> None:
    q, k, v = (t.bfloat16() for t in qkv())
    narrow = attention(softcap=CAP).bfloat16()(q[:, None], k[:, None], v[:, None], None)[:, 0]
    exact = plain_attention(q.double(), k.double(), v.double(), softcap=CAP)
    torch.testing.assert_close(narrow, exact.bfloat16(), rtol=2**-7, atol=0)
    assert narrow.shape == (T, exact.size(1))


def test_a_gpu_takes_the_same_way_with_shared_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention is for scores without a cap."""
    monkeypatch.setattr(specs, "attend_with_prefixes", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    q, k, v = (t.detach() for t in row(BOUNDS[-1]))
    cu = known(torch.tensor(BOUNDS, dtype=torch.int32), BOUNDS, PREFIXES)
    assert isinstance(cu, torch.Tensor) and Segments(BOUNDS, PREFIXES).has_prefixes
    params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=BOUNDS[-1])
    assert attention(softcap=CAP)(q, k, v, None, packed_seq_params=params).shape == (BOUNDS[-1], q[0].numel())


def test_dropout_is_refused() -> None:
    with pytest.raises(ValueError, match="capped scores have no dropout"):
        attention(softcap=CAP, attention_dropout=0.1)
