"""The zigzag split of rows, and attention over a shared row, against plain loops. Collectives are stood in for here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType

from fusemega.runtime import specs
from fusemega.runtime.context_parallel import zigzag
from fusemega.runtime.specs import SDPAttention
from tests.runtime.test_specs import D, G, N, assert_same_with_gradients, config, plain_attention


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def test_every_rank_has_two_pieces_of_every_segment() -> None:
    cu = bounds([8, 4, 12])
    assert zigzag(cu, 0, 2).tolist() == [0, 1, 6, 7, 8, 11, 12, 13, 14, 21, 22, 23]
    assert zigzag(cu, 1, 2).tolist() == [2, 3, 4, 5, 9, 10, 15, 16, 17, 18, 19, 20]
    assert zigzag(bounds([8]), 1, 4).tolist() == [1, 6]
    for size in (1, 2, 3):
        places = torch.cat([zigzag(bounds([12, 24, 36]), rank, size) for rank in range(size)])
        assert places.sort().values.tolist() == list(range(72))
    with pytest.raises(ValueError, match=r"\[8, 6\] tokens are not all multiples of 4"):
        zigzag(bounds([8, 6]), 0, 2)


def attention(rank: int, size: int, softcap: float | None = None, **changes: Any) -> SDPAttention:
    group = SimpleNamespace(rank=lambda: rank, size=lambda: size)
    settings = config(context_parallel_size=size, **changes)
    groups = SimpleNamespace(cp=group)
    return SDPAttention(settings, 1, AttnMaskType.causal, "self", pg_collection=groups, softcap=softcap).double()


@pytest.mark.parametrize("before", [None, 0, 3, 50])
@pytest.mark.parametrize("block", [2, 512])
@pytest.mark.parametrize(("size", "lengths"), [(2, [4]), (2, [12, 4, 8]), (3, [6, 18])])
def test_shared_rows_equal_plain_loops(
    monkeypatch: pytest.MonkeyPatch, before: int | None, block: int, size: int, lengths: list[int]
) -> None:
    monkeypatch.setattr(specs, "_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(sum(lengths), heads, D, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (N, G, G)
    )
    # Every rank is given the whole row, as the gather would: its own part and what the others hold.
    monkeypatch.setattr(specs, "gather_row", lambda part, cu, group: torch.stack([k, v], dim=1))
    cu = bounds(lengths)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=max(lengths))
    window = {} if before is None else {"window_size": (before, 0)}
    mine = [zigzag(cu, rank, size) for rank in range(size)]
    parts = [
        attention(rank, size, **window)(q[places], k[places], v[places], None, packed_seq_params=packed)
        for rank, places in enumerate(mine)
    ]
    out = torch.cat(parts)[torch.cat(mine).argsort()]
    segments = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    expected = torch.cat([plain_attention(*segment, before=before) for segment in segments])
    assert_same_with_gradients(out, expected, (q, k, v))


def test_rows_that_are_not_packed_are_refused() -> None:
    q = torch.randn(4, 1, N, D)
    with pytest.raises(ValueError, match="needs packed rows"):
        attention(0, 2)(q, q[:, :, :G], q[:, :, :G], None)
    with pytest.raises(ValueError, match="needs the process groups"):
        SDPAttention(config(context_parallel_size=2), 1, AttnMaskType.causal, "self")
