"""Attention of packed rows on the card against each segment alone, in float64 on the CPU: values and gradients.

Shape suffixes: T tokens of the row, N query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from fusemega.runtime.segments import NO_PREFIX as NONE
from fusemega.runtime.segments import Prefix, Segments, known
from fusemega.runtime.shared_prompts import attend_with_prefixes
from fusemega.runtime.specs import SDPAttention
from gpu.job import Job
from gpu.report import NotHereError, Report

N, G, D = 8, 2, 64
ERRORS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # relative, of values and of gradients
Three = tuple[Tensor, Tensor, Tensor]  # queries, keys, values
Row = tuple[Sequence[int], Sequence[Prefix], int | None]
# Bounds of the segments, what each continues, and the window.
ROWS: dict[str, Row] = {
    "segments of unequal length": ((0, 130, 131, 200, 520), (), None),
    "segments of equal length": ((0, 96, 192, 288), (), None),
    "sliding window": ((0, 300, 420), (), 64),
    "shared prompts": ((0, 40, 160, 200, 263, 264, 300), (NONE, NONE, *3 * ((40, 160),), NONE), None),
    "shared prompts, sliding window": ((0, 150, 230, 290), (NONE, (0, 150), (0, 150)), 64),
}


def alone(query: Tensor, key: Tensor, value: Tensor, row: Row) -> Tensor:
    """[T, N * D]: each segment behind what it continues, as a text of its own, by a whole mask."""
    bounds, prefixes, window = row
    parts = []
    for place, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        first, last = prefixes[place] if prefixes else (0, 0)
        places = torch.tensor([*range(first, last), *range(start, end)])
        q_TND, k_TND, v_TND = query[start:end], *(t[places].repeat_interleave(N // G, 1) for t in (key, value))
        scores = torch.einsum("tnd,snd->nts", q_TND, k_TND) / D**0.5
        back = torch.arange(last - first, len(places))[:, None] - torch.arange(len(places))[None]
        seen = (back >= 0) & (back <= (len(places) if window is None else window))
        parts.append(torch.einsum("nts,snd->tnd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v_TND))
    return torch.cat(parts).flatten(1)


def core(window: int | None) -> SDPAttention:
    """The core attention of a layer."""
    settings = {} if window is None else {"window_size": (window, 0)}
    config = TransformerConfig(
        num_layers=1,
        hidden_size=N * D,
        num_attention_heads=N,
        num_query_groups=G,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        **settings,
    )
    return SDPAttention(config, 1, AttnMaskType.causal, "self")


def packed(row: Row, device: torch.device) -> PackedSeqParams:
    bounds, prefixes, _ = row
    cu = known(torch.tensor(bounds, dtype=torch.int32, device=device), bounds, prefixes)
    longest = max(b - a for a, b in zip(bounds, bounds[1:], strict=False))
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def apart(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.detach().cpu().double() - theirs).norm() / theirs.norm()).item()


def measure(report: Report, job: Job) -> None:
    for name, row in ROWS.items():
        for dtype in (torch.float32, torch.bfloat16):
            what = f"{name}, {str(dtype).removeprefix('torch.')}"
            with report.case(what):
                compare(report, job, what, row, dtype)
    with report.case("FlexAttention, values"):
        flex(report, job)


def _inputs(job: Job, length: int, dtype: torch.dtype) -> tuple[Three, Three]:
    """Queries, keys and values for the card, and the same in float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(length, heads, D, generator=generator).to(dtype) for heads in (N, G, G))
    mine = (q.to(job.card.device), k.to(job.card.device), v.to(job.card.device))
    reference = (q.double(), k.double(), v.double())
    for tensor in (*mine, *reference):
        tensor.requires_grad_()
    return mine, reference


def compare(report: Report, job: Job, what: str, row: Row, dtype: torch.dtype) -> None:
    mine, reference = _inputs(job, row[0][-1], dtype)
    found = core(row[2])(*mine, None, packed_seq_params=packed(row, job.card.device))
    wanted = alone(*reference, row)
    report.compare(f"{what}: values", apart(found, wanted.detach()), ERRORS[dtype], "relative")
    upstream = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).double()
    slopes = torch.autograd.grad((wanted * upstream).sum(), reference)
    slants = torch.autograd.grad((found * upstream.to(found)).sum(), mine)
    worst = max(apart(a, b) for a, b in zip(slants, slopes, strict=True))
    report.compare(f"{what}: gradients", worst, ERRORS[dtype], "relative")


def flex(report: Report, job: Job) -> None:
    """The form of shared prompts that a GPU takes; a CPU has its values alone, uncompiled."""
    if job.card.is_gpu:
        raise NotHereError("the rows of shared prompts above are by it")
    row = ROWS["shared prompts, sliding window"]
    (q, k, v), reference = _inputs(job, row[0][-1], torch.float32)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that it is not compiled
        found = attend_with_prefixes(q.detach(), k.detach(), v.detach(), Segments(row[0], row[1]), row[2], None)
    error = apart(found, alone(*reference, row).detach())
    report.compare("FlexAttention, values", error, ERRORS[torch.float32], "relative")
