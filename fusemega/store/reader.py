"""Rows of a store by key, from any process, in any order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from fusemega.store.manifest import Manifest, read_manifest
from fusemega.store.row import Row
from fusemega.store.shard import INDEX, Shard
from fusemega.store.writer import shard_paths


class Store:
    """An open store; `open` makes one. Sees the shards that were whole at that moment.

    Attributes:
        path: its folder.
        manifest: who scored it, and how.
        shards: its files.
    """

    def __init__(self, path: Path, manifest: Manifest, shards: list[Shard]) -> None:
        self.path, self.manifest, self.shards = path, manifest, shards
        keys = np.concatenate([np.empty(0, dtype=INDEX), *(shard.index for shard in shards)])["key"]
        counts = [len(shard.index) for shard in shards]
        # Sorted by the keys' first 8 bytes; the rest is compared when a row is looked up.
        heads = np.ascontiguousarray(keys[:, :8]).view(">u8").reshape(-1).astype(np.uint64)
        order = np.argsort(heads, kind="stable")
        self._heads, self._keys = heads[order], keys[order]
        self._shard_of = np.repeat(np.arange(len(shards)), counts)[order]
        self._row_of = np.concatenate([np.arange(n) for n in counts] or [np.empty(0, dtype=np.int64)])[order]

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Opens the store in folder `path`, reading manifest and indexes only.

        Raises:
            UserError: no store there; a truncated or damaged shard, by name.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        return cls(folder, manifest, [Shard(shard, manifest) for shard in shard_paths(folder)])

    def __len__(self) -> int:
        return len(self._heads)

    def __contains__(self, key: bytes) -> bool:
        return self._place(key) is not None

    def get(self, key: bytes) -> Row | None:
        """The row of a sample, or None. No other row is touched.

        Raises:
            UserError: its bytes were changed.
        """
        place = self._place(key)
        return None if place is None else place[0].row(place[1])

    def entry(self, key: bytes) -> np.void | None:
        """What the index says of a sample, as `shard.INDEX`: its `sum_logp`, `positions` and `ids_hash`; or None.

        No row's bytes are read. The entry may be read only.
        """
        place = self._place(key)
        return None if place is None else place[0].index[place[1]]

    def coded(self, key: bytes) -> tuple[np.ndarray, bytes] | None:
        """The row as it is on disk, as `Shard.coded` returns it. Raises as `get`."""
        place = self._place(key)
        return None if place is None else place[0].coded(place[1])

    def rows_hash(self, keys: Iterable[bytes]) -> str:
        """Hash, 32 hex digits, of the rows of samples, in order. A missing row changes it too.

        It is made from the rows' checksums, so no row is read. Equal rows give equal hashes, whatever shards they are
        in, and whatever other rows are there.
        """
        digest, missing = xxhash.xxh3_128(), np.zeros(1, dtype=INDEX).tobytes()
        for key in keys:
            place = self._place(key)
            if place is None:
                digest.update(missing)
            else:
                entry = place[0].index[place[1] : place[1] + 1].copy()
                entry["begin"] = 0  # where the row lies in its shard does not count
                digest.update(entry.tobytes())
        return digest.hexdigest()

    def check(self, expected: Mapping[str, Any]) -> None:
        """Raises UserError naming the first manifest field whose value is not the expected one."""
        self.manifest.check(expected, self.path)

    def _place(self, key: bytes) -> tuple[Shard, int] | None:
        head = np.uint64(int.from_bytes(key[:8], "big"))
        place = int(np.searchsorted(self._heads, head))
        while place < len(self._heads) and self._heads[place] == head:
            if self._keys[place].tobytes() == key:
                return self.shards[self._shard_of[place]], int(self._row_of[place])
            place += 1
        return None
