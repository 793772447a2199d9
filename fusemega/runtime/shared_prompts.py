"""Attention of rows with shared prompts, on a GPU: torch's FlexAttention, one call a row, and where it cannot run.

Flash kernels know segments that begin with nothing. Here a segment may see another one in front of it: that is a mask
of blocks, made once a row from the segments' numbers and positions. Blocks that see nothing are skipped. The CPU's form
of the same is in `specs`. **Not measured**: no GPU has run this. On a CPU torch has the forward pass alone, which the
tests compare.

Shape suffixes: T tokens of a packed row, N query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fusemega.runtime.device import sent
from fusemega.runtime.layout import ParallelConfig
from fusemega.runtime.segments import Segments

_LEAST_HEAD = 16  # FlexAttention's kernels take no narrower heads


def sharing_problem(parallel: ParallelConfig, fp8: bool, head_size: int) -> str | None:
    """Why shared prompts cannot be run on this machine; None where they can.

    A CPU runs them in every layout.
    """
    if not torch.cuda.is_available():
        return None
    if importlib.util.find_spec("triton") is None:
        return "FlexAttention is compiled by triton, which is not installed: pip install triton"
    if parallel.context_parallel_size > 1:
        return f"a GPU attends to shared prompts in whole rows; allowed: context_parallel_size 1, found {parallel}"
    if fp8:
        return "attention to shared prompts has not been run beside FP8; allowed: model.fp8 left out"
    if head_size < _LEAST_HEAD:
        return f"FlexAttention needs heads of {_LEAST_HEAD} or more, and the model's have {head_size}"
    return None


def attend_with_prefixes(
    query_TND: Tensor, key_TGD: Tensor, value_TGD: Tensor, segments: Segments, window: int | None, scale: float | None
) -> Tensor:
    """Causal attention within each segment and to what it continues, [T, N * D].

    Args:
        window: a query sees so many tokens of its text before itself; None: all.
        scale: of the products; None: 1 / sqrt(D).
    """
    from torch.nn.attention.flex_attention import flex_attention

    device = query_TND.device
    mask = segments.kept(("flex", device, window), lambda: _block_mask(segments, window, device))
    attend = _compiled(flex_attention) if query_TND.is_cuda else flex_attention
    out_1NTD = attend(
        *(t.transpose(0, 1)[None] for t in (query_TND, key_TGD, value_TGD)),
        block_mask=mask,
        scale=scale,
        enable_gqa=query_TND.size(1) != key_TGD.size(1),
    )
    return out_1NTD[0].transpose(0, 1).flatten(1)


def _block_mask(segments: Segments, window: int | None, device: torch.device) -> Any:
    """FlexAttention's mask of a row."""
    from torch.nn.attention.flex_attention import create_block_mask

    lengths = torch.tensor(segments.lengths, device="cpu")
    numbers = {start: number for number, start in enumerate(segments.bounds[:-1])}
    continued = [numbers[first] if end > first else -1 for first, end in segments.prefixes]
    starts = torch.tensor(segments.bounds[:-1], device="cpu") - torch.tensor(segments.before, device="cpu")
    of_segments = torch.stack([torch.arange(len(lengths), device="cpu"), torch.tensor(continued, device="cpu"), starts])
    segment_T, prompt_T, start_T = sent(of_segments.repeat_interleave(lengths, dim=1), device)
    total = segments.bounds[-1]
    position_T = torch.arange(total, device=device) - start_T

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        back = position_T[query] - position_T[key]
        before = (segment_T[query] == segment_T[key]) | (prompt_T[query] == segment_T[key])
        seen = before & (back >= 0)
        return seen if window is None else seen & (back <= window)

    make = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
    return make(sees, None, None, total, total, device=device)


@cache
def _compiled(function: Any) -> Any:
    """Rows differ in length: one kernel for all of them."""
    return torch.compile(function, dynamic=True)
