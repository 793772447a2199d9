"""Rows of a store by key, from any process, in any order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fusemega.store.manifest import Manifest, read_manifest
from fusemega.store.shard import Row, Shard
from fusemega.store.writer import shard_paths


class Store:
    """An open store; `open` makes one. Sees the shards that were whole at that moment.

    Attributes:
        path: its folder.
        manifest: who scored it, and how.
    """

    def __init__(self, path: Path, manifest: Manifest, shards: list[Shard]) -> None:
        self.path, self.manifest, self._shards = path, manifest, shards
        keys = np.concatenate([shard.keys for shard in shards]) if shards else np.empty((0, 16), dtype=np.uint8)
        counts = [len(shard.keys) for shard in shards]
        # Sorted by the keys' first 8 bytes; the rest is compared when a row is looked up.
        heads = np.ascontiguousarray(keys[:, :8]).view(">u8").reshape(-1).astype(np.uint64)
        order = np.argsort(heads, kind="stable")
        self._heads, self._keys = heads[order], keys[order]
        self._shard_of = np.repeat(np.arange(len(shards)), counts)[order]
        self._row_of = np.concatenate([np.arange(n) for n in counts] or [np.empty(0, dtype=np.int64)])[order]

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Opens the store in folder `path`, reading manifest and keys only.

        Raises:
            UserError: no store there; a truncated or damaged shard, by name.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        return cls(folder, manifest, [Shard(shard) for shard in shard_paths(folder)])

    def __len__(self) -> int:
        return len(self._heads)

    def __contains__(self, key: bytes) -> bool:
        return self._find(key) is not None

    def get(self, key: bytes) -> Row | None:
        """The row of a sample, or None. The first row of a shard checks the shard's checksums."""
        place = self._find(key)
        if place is None:
            return None
        return self._shards[self._shard_of[place]].row(int(self._row_of[place]))

    def check(self, expected: Mapping[str, Any]) -> None:
        """Raises UserError naming the first manifest field whose value is not the expected one."""
        self.manifest.check(expected, self.path)

    def _find(self, key: bytes) -> int | None:
        head = np.uint64(int.from_bytes(key[:8], "big"))
        place = int(np.searchsorted(self._heads, head))
        while place < len(self._heads) and self._heads[place] == head:
            if self._keys[place].tobytes() == key:
                return place
            place += 1
        return None
