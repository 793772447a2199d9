"""Describes a store from its manifest and indexes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fusemega.store.reader import Store
from fusemega.store.shard import INDEX


def describe(path: str | Path) -> dict[str, Any]:
    """JSON-able: the manifest's fields without those of the other kind of rows, and the following.

    samples, positions, shards, size_bytes (of all shards), bytes_per_position and bytes_per_sample (shares of it),
    text_bytes (UTF-8 bytes of the supervised tokens), and the mean cross-entropies of these tokens, in nats, at
    temperature 1: cross_entropy_per_token for the scorer's own tokenizer, cross_entropy_per_byte for comparing scorers.
    Without positions, means are None.

    Raises:
        UserError: as `Store.open`.
    """
    store = Store.open(path)
    index = np.concatenate([np.empty(0, dtype=INDEX), *(shard.index for shard in store.shards)])
    positions, text_bytes = int(index["positions"].sum()), int(index["num_bytes"].sum())
    scored = int(index["num_scored"].sum())
    size, nats = sum(shard.path.stat().st_size for shard in store.shards), -float(index["sum_logp"].sum())
    return {
        "path": str(path),
        **store.manifest.model_dump(exclude_none=True),
        "samples": len(index),
        "positions": positions,
        "shards": len(store.shards),
        "size_bytes": size,
        "bytes_per_position": round(size / positions, 2) if positions else None,
        "bytes_per_sample": round(size / len(index), 2) if len(index) else None,
        "text_bytes": text_bytes,
        "cross_entropy_per_token": nats / scored if scored and store.manifest.rows != "hidden" else None,
        "cross_entropy_per_byte": nats / text_bytes if text_bytes else None,
    }
