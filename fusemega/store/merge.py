"""Merges several stores of one scorer into one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fusemega.errors import UserError
from fusemega.store.reader import Store
from fusemega.store.writer import StoreWriter

_SHARD_BYTES = 1 << 26


def open_inputs(sources: Sequence[str | Path]) -> list[Store]:
    """The stores, checked to be of one scorer.

    Raises:
        UserError: none given, one given twice, one that cannot be opened, or of another scorer (naming the field).
    """
    stores = [Store.open(source) for source in sources]
    if len({store.path.resolve() for store in stores}) < max(2, len(stores)):
        raise UserError("store merge: give at least two stores, each once")
    for store in stores[1:]:
        store.check(stores[0].manifest.model_dump(exclude={"versions"}))
    return stores


def merge(stores: Sequence[Store], out: Path) -> tuple[int, int]:
    """Writes all rows of `stores` (from `open_inputs`) into a new store `out`, as they are coded, shard by shard.

    Returns:
        Samples written, and repetitions left out.

    Raises:
        UserError: a sample that has different rows in two stores; a damaged row; a full disk.
    """
    written = repeated = 0
    with StoreWriter(out, stores[0].manifest, shard_bytes=_SHARD_BYTES) as writer:
        for store in stores:
            for shard in store.shards:
                for r in range(len(shard.index)):
                    entry, codes = shard.coded(r)
                    key = entry["key"].tobytes()
                    if key not in writer:
                        writer.add_coded(entry, codes)
                        written += 1
                        continue
                    first, (first_entry, first_codes) = _first(key, stores)
                    if (first_entry.tobytes(), first_codes) != (entry.tobytes(), codes):
                        raise UserError(
                            f"{shard.path}: its row of sample {key.hex()} differs from the one in {first.path}; "
                            "only stores that agree on their common samples can be merged"
                        )
                    repeated += 1
    return written, repeated


def _first(key: bytes, stores: Sequence[Store]) -> tuple[Store, tuple[np.ndarray, bytes]]:
    return next((store, coded) for store in stores if (coded := store.coded(key)) is not None)
