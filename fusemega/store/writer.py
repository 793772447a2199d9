"""Adds rows to a store in shards that are complete or absent; a restarted writer skips samples that have a row."""

from __future__ import annotations

import re
from pathlib import Path
from types import TracebackType

import numpy as np

from fusemega.errors import UserError
from fusemega.store.checks import check_row
from fusemega.store.coding import encode
from fusemega.store.manifest import Manifest, check_claim, claim_manifest
from fusemega.store.row import Row
from fusemega.store.shard import KEY_BYTES, Shard, index_entry, write_shard

_NAME = re.compile(r"shard-(\d{5})-(\d{6})\.bin")


def shard_paths(folder: Path) -> list[Path]:
    """The store's whole shards, sorted by name."""
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def check_store(folder: Path, manifest: Manifest) -> None:
    """Checks that a `StoreWriter` could start or continue there; call it before any long work. Writes nothing.

    Raises:
        UserError: another manifest (naming the field), another program's folder, a damaged shard, or no folder.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: exists and is not a sample store")
    check_claim(folder, manifest)
    for path in shard_paths(folder) if folder.is_dir() else []:
        Shard(path, manifest)


class StoreWriter:
    """One of a store's writers (usually one for each data-parallel rank); use as a context manager.

    Rows are written one shard at a time: when the buffer holds `shard_bytes`, at `flush` and at a clean exit. A crash
    loses only the buffer. Keys that are durable already, whoever wrote them, are in `writer` and may be
    skipped before they are scored.

    Args:
        path: the store's folder, made if absent.
        manifest: this scorer's manifest; a store begun with another is refused.
        writer_id: distinct for writers that run at the same time.
        shard_bytes: size of the buffer from which on it is written.

    Raises:
        UserError: another manifest (naming the field), a damaged shard, a folder that cannot be written.

    Example:
        >>> import tempfile
        >>> from fusemega.store import Store
        >>> about = {"weights": "w", "tokenizer": "t", "template": None, "mask_policy": "all", "truncation": 8}
        >>> manifest = Manifest(**about, temperature=1.0, top_k=2, vocab_size=100)
        >>> row = Row(
        ...     ids_hash=bytes(8), end_bytes=np.int32([4]), ids_PK=np.int32([[7, 42]]),
        ...     logp_PK=np.log(np.float32([[0.5, 0.25]])), log_residual_P=np.log(np.float32([0.25])),
        ...     sum_logp=-0.7, num_bytes=3,
        ... )
        >>> key = bytes(16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with StoreWriter(folder, manifest) as writer:
        ...         writer.add(key, row)
        ...     found = Store.open(folder).get(key)
        >>> found.ids_PK, np.exp(found.logp_PK).round(1)
        (array([[ 7, 42]], dtype=int32), array([[0.5, 0.2]], dtype=float32))
    """

    def __init__(self, path: str | Path, manifest: Manifest, *, writer_id: int = 0, shard_bytes: int = 1 << 24) -> None:
        self._folder, self._manifest, self._writer_id, self._shard_bytes = Path(path), manifest, writer_id, shard_bytes
        claim_manifest(self._folder, manifest)
        # Only those with this writer's id: other writers may be writing theirs now.
        for leftover in self._folder.glob(f".shard-{writer_id:05d}-*.partial"):
            leftover.unlink(missing_ok=True)
        paths = shard_paths(self._folder)
        own = [int(path.stem.rsplit("-", 1)[1]) for path in paths if path.name.startswith(f"shard-{writer_id:05d}-")]
        self._next = 1 + max(own, default=-1)
        self._known = {key.tobytes() for path in paths for key in Shard(path, manifest).index["key"]}
        self._index: list[np.ndarray] = []
        self._codes: list[bytes] = []
        self._buffered = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._known

    def add(self, key: bytes, row: Row) -> None:
        """Buffers a row; a key that is already there is not changed.

        Raises:
            UserError, ValueError: as `check_row`; nothing of it is stored.
        """
        if key in self._known:
            return
        check_row(row, self._manifest, f"{self._folder}: sample {key.hex()}")
        if len(key) != KEY_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes, found {len(key)}")
        codes = encode(row, self._manifest)
        self.add_coded(index_entry(key, row, codes), codes)

    def add_coded(self, entry: np.ndarray, codes: bytes) -> None:
        """Buffers a row as `Shard.coded` gives it, of a shard of the same manifest; its key must be new."""
        self._known.add(entry["key"].tobytes())
        self._index.append(entry)
        self._codes.append(codes)
        self._buffered += entry.nbytes + len(codes)
        if self._buffered >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Makes every buffered row durable."""
        if self._codes:
            name = f"shard-{self._writer_id:05d}-{self._next:06d}.bin"
            write_shard(self._folder / name, self._manifest, np.concatenate(self._index), self._codes)
            self._next += 1
            self._index, self._codes, self._buffered = [], [], 0

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.flush()
