"""Checks every row of a store, and whether it covers a data set.

Shape suffixes: P positions, K entries of a position.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fusemega.errors import UserError
from fusemega.store.checks import check_row
from fusemega.store.reader import Store
from fusemega.text.sample import Sample


@dataclass(frozen=True)
class Coverage:
    """How many of a data set's samples have their row in a store.

    Attributes:
        samples: number of samples of the data set.
        missing: number of them without a row.
        other_tokenization: number of them whose row has other token ids, or other positions.
        first_bad: "file:row" of the first sample that is either, or None.
    """

    samples: int
    missing: int
    other_tokenization: int
    first_bad: str | None


def verify_rows(store: Store) -> int:
    """Reads every row: its checksum, that it is a distribution over the scorer's vocabulary by falling
    probability, and that no sample is there twice. Returns the number of rows.

    Raises:
        UserError: the first row that is not so, by shard and sample.
    """
    seen: set[bytes] = set()
    for shard in store.shards:
        for r, key in enumerate(map(bytes, shard.index["key"])):
            where, row = f"{shard.path}: sample {key.hex()}", shard.row(r)
            try:
                check_row(row, store.manifest, where)
            except ValueError as error:
                raise UserError(f"{where}: {error}") from None
            if (row.logp_PK[:, 1:] > row.logp_PK[:, :-1]).any():
                raise UserError(f"{where}: its entries are not sorted by falling probability")
            if key in seen:
                raise UserError(f"{where}: the sample already has a row")
            seen.add(key)
    return len(seen)


def coverage(store: Store, samples: Iterable[Sample]) -> Coverage:
    """Looks every sample up. Raises as `Store.get`."""
    total = missing = other = 0
    first_bad: str | None = None
    for sample in samples:
        total += 1
        row = store.get(sample.key)
        if row is not None and row.ids_hash == sample.ids_hash and row.num_tokens == len(sample.positions):
            continue
        missing += row is None
        other += row is not None
        first_bad = first_bad or sample.source
    return Coverage(total, missing, other, first_bad)
