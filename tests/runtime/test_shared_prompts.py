"""Attention of rows with shared prompts: that of each prompt and response alone, by plain loops."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from fusemega.runtime import shared_prompts, specs
from fusemega.runtime.context_parallel import zigzag
from fusemega.runtime.layout import ParallelConfig
from fusemega.runtime.rope import _angles
from fusemega.runtime.segments import Prefix, Segments, known
from fusemega.runtime.shared_prompts import attend_with_prefixes, sharing_problem
from fusemega.runtime.text_rope import NOTHING
from tests.runtime import test_context_parallel
from tests.runtime.test_specs import D, G, N, assert_same_with_gradients, attention, plain_attention

# A text alone; a prompt of 5 with responses of 3, 3 and 1; a prompt as long as the segment before; padding.
BOUNDS = (0, 4, 9, 12, 15, 16, 17, 19, 24, 26)
PREFIXES: tuple[Prefix, ...] = ((0, 0), (0, 0), (4, 9), (4, 9), (4, 9), (0, 0), (16, 17), (16, 17), (0, 0))


def row(length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(length, heads, D, generator=generator, dtype=torch.float64) for heads in (N, G, G))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def packed(bounds: tuple[int, ...], prefixes: tuple[Prefix, ...]) -> PackedSeqParams:
    cu = known(torch.tensor(bounds, dtype=torch.int32), bounds, prefixes)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=max(bounds))


def by_loops(q: Tensor, k: Tensor, v: Tensor, bounds: Any, prefixes: Any, before: int | None) -> Tensor:
    """Each segment behind what it continues, as a text of its own."""

    def parts() -> Iterator[Tensor]:
        for (start, end), (first, last) in zip(zip(bounds, bounds[1:], strict=False), prefixes, strict=True):
            places = [*range(first, last), *range(start, end)]
            yield plain_attention(q[places], k[places], v[places], before=before)[last - first :]

    return torch.cat([*parts()])


@pytest.mark.parametrize("before", [None, 0, 2, 6])
@pytest.mark.parametrize("block", [2, 512])
def test_responses_see_the_prompt_and_themselves(
    monkeypatch: pytest.MonkeyPatch, before: int | None, block: int
) -> None:
    monkeypatch.setattr(specs, "_BLOCK", block)
    q, k, v = row(BOUNDS[-1])
    window = {} if before is None else {"window_size": (before, 0)}
    out = attention(**window)(q, k, v, None, packed_seq_params=packed(BOUNDS, PREFIXES))
    assert_same_with_gradients(out, by_loops(q, k, v, BOUNDS, PREFIXES, before), (q, k, v))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("before", [None, 2])
def test_the_gpus_form_has_the_same_values(before: int | None) -> None:
    """Uncompiled, as a CPU runs it; without gradients, which torch has on GPUs only."""
    q, k, v = (t.detach() for t in row(BOUNDS[-1]))
    segments = Segments(BOUNDS, PREFIXES)
    for scale in (None, 0.5):
        out = attend_with_prefixes(q, k, v, segments, before, scale)
        wanted = by_loops(q if scale is None else q * scale * D**0.5, k, v, BOUNDS, PREFIXES, before)
        torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    made = shared_prompts._block_mask
    assert segments.kept(("flex", q.device, before), lambda: made(segments, 0, q.device)) is segments.kept(
        ("flex", q.device, before), list
    ), "one mask for all layers of a row"


@pytest.mark.parametrize("before", [None, 3])
@pytest.mark.parametrize("size", [2, 3])
def test_context_parallel_ranks_share_such_a_row(
    monkeypatch: pytest.MonkeyPatch, before: int | None, size: int
) -> None:
    """The prompt's padding, in its own segment, is seen by no response."""
    m = 2 * size
    bounds = (0, m, 3 * m, 4 * m, 6 * m)
    prefixes = ((0, 0), (0, 0), (m, 3 * m - 1), (m, 3 * m - 1))
    q, k, v = row(bounds[-1])
    monkeypatch.setattr(specs, "gather_row", lambda part, cu, group: torch.stack([k, v], dim=1))
    window = {} if before is None else {"window_size": (before, 0)}
    mine = [zigzag(torch.tensor(bounds), rank, size) for rank in range(size)]
    parts = [
        test_context_parallel.attention(rank, size, **window)(
            q[places], k[places], v[places], None, packed_seq_params=packed(bounds, prefixes)
        )
        for rank, places in enumerate(mine)
    ]
    out = torch.cat(parts)[torch.cat(mine).argsort()]
    assert_same_with_gradients(out, by_loops(q, k, v, bounds, prefixes, before), (q, k, v))
    positions = torch.arange(bounds[-1])[:, None, None, None]
    segments = Segments(bounds, prefixes)
    angles = torch.cat([_angles(positions, segments, rank, size, NOTHING) for rank in range(size)])[
        torch.cat(mine).argsort()
    ]
    wanted = [*range(m), *range(2 * m), *range(2 * m - 1, 3 * m - 1), *range(2 * m - 1, 4 * m - 1)]
    assert angles.flatten().tolist() == wanted


def test_where_a_gpu_cannot_run_them(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = ParallelConfig(tensor_model_parallel_size=2), ParallelConfig(context_parallel_size=2)
    assert sharing_problem(two, True, 8) is None, "a CPU runs all"
    monkeypatch.setattr(shared_prompts, "torch", SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True)))
    found: list[str] = []
    monkeypatch.setattr(shared_prompts.importlib.util, "find_spec", lambda name: found or None)
    assert "triton, which is not installed" in str(sharing_problem(one, False, 64))
    found.append("triton")
    assert sharing_problem(one, False, 16) is None
    for problem, said in (
        (sharing_problem(two, False, 64), "allowed: context_parallel_size 1, found TP 1 x CP 2 x PP 1"),
        (sharing_problem(one, True, 64), "beside FP8; allowed: model.fp8 left out"),
        (sharing_problem(one, False, 8), "needs heads of 16 or more, and the model's have 8"),
    ):
        assert said in str(problem)
