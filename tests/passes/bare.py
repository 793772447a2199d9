"""A micro-batch of which only what a token loss reads is there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusemega.passes.micro_batch import MicroBatch


def bare_batch(labels_N: Tensor, position_fields: Mapping[str, Tensor] | None = None, **changes: Any) -> MicroBatch:
    """One sequence whose supervised positions have these labels and fields; other attributes as in `changes`."""
    count = len(labels_N)
    one = torch.ones(1, dtype=torch.int64)
    given: dict[str, Any] = {
        "tokens": torch.zeros(1, count + 1, dtype=torch.int64),
        "position_ids": torch.arange(count + 1)[None],
        "cu_seqlens": torch.tensor([0, count + 1], dtype=torch.int32),
        "bounds": (0, count + 1),
        "prefixes": ((0, 0),),
        "max_seqlen": count + 1,
        "positions": torch.arange(count),
        "labels": labels_N,
        "sequences": torch.zeros(count, dtype=torch.int64),
        "sequence_tokens": one * count,
        "last_tokens": one * count,
        "groups": 0 * one,
        "group_sizes": one,
        "sources": ("rows.jsonl:1",),
        "position_fields": dict(position_fields or {}),
        "num_positions": count,
    }
    return MicroBatch(**(given | changes))
