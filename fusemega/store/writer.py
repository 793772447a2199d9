"""Adds rows to a store, in shards that are whole or absent; a restarted writer skips what is already there."""

from __future__ import annotations

import re
from pathlib import Path
from types import TracebackType

import numpy as np

from fusemega.errors import UserError
from fusemega.store.manifest import Manifest, check_claim, claim_manifest
from fusemega.store.shard import HASH_BYTES, KEY_BYTES, Row, Shard, write_shard

_NAME = re.compile(r"shard-(\d{5})-(\d{6})\.bin")


def shard_paths(folder: Path) -> list[Path]:
    """The store's whole shards, sorted by name."""
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def check_store(folder: Path, manifest: Manifest) -> None:
    """Whether a `StoreWriter` could begin, or go on, there; to be called before any long work. Writes nothing.

    Raises:
        UserError: another manifest (naming the field), somebody's folder, a damaged shard, a path that is no folder.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: exists and is no sample store")
    check_claim(folder, manifest)
    for path in shard_paths(folder) if folder.is_dir() else []:
        Shard(path)


class StoreWriter:
    """One of a store's writers (usually one a data-parallel rank); use as a context manager.

    Rows become durable a shard at a time, when the buffer holds `shard_bytes`, at `flush` and at a clean exit;
    a crash loses the buffer only. Keys that are durable already, whoever wrote them, are in `writer` and may be
    skipped before they are scored.

    Args:
        path: the store's folder, made if absent.
        manifest: of this scorer; a store begun under another is refused.
        writer_id: distinct for writers that run at the same time.
        shard_bytes: of the buffer, before it is written.

    Raises:
        UserError: another manifest (naming the field), a damaged shard, a folder that cannot be written.
    """

    def __init__(self, path: str | Path, manifest: Manifest, *, writer_id: int = 0, shard_bytes: int = 1 << 24) -> None:
        self._folder, self._manifest, self._writer_id, self._shard_bytes = Path(path), manifest, writer_id, shard_bytes
        claim_manifest(self._folder, manifest)
        for leftover in self._folder.glob(f".shard-{writer_id:05d}-*.partial"):
            leftover.unlink(missing_ok=True)
        paths = shard_paths(self._folder)
        own = [int(path.stem.rsplit("-", 1)[1]) for path in paths if path.name.startswith(f"shard-{writer_id:05d}-")]
        self._next = 1 + max(own, default=-1)
        self._known = {key.tobytes() for path in paths for key in Shard(path).keys}
        self._keys: list[bytes] = []
        self._rows: list[Row] = []
        self._buffered = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._known

    def add(self, key: bytes, row: Row) -> None:
        """Buffers a row; a key that is already there is left as it is.

        Raises:
            UserError: not-a-number, an infinite or positive log-prob, an id beyond the manifest's vocabulary.
            ValueError: shapes that disagree with each other or with the manifest's top_k.
        """
        if key in self._known:
            return
        self._check(key, row)
        self._known.add(key)
        self._keys.append(key)
        self._rows.append(row)
        self._buffered += row.num_tokens * (8 + 6 * self._manifest.top_k)
        if self._buffered >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Makes every buffered row durable."""
        if self._rows:
            name = f"shard-{self._writer_id:05d}-{self._next:06d}.bin"
            write_shard(self._folder / name, self._keys, self._rows)
            self._next += 1
            self._keys, self._rows, self._buffered = [], [], 0

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.flush()

    def _check(self, key: bytes, row: Row) -> None:
        positions, top_k = row.num_tokens, self._manifest.top_k
        shapes = (np.shape(row.ids_PK), np.shape(row.logp_PK), np.shape(row.log_residual_P))
        if positions == 0 or shapes != ((positions, top_k), (positions, top_k), (positions,)):
            raise ValueError(f"row of {positions} positions and top_k {top_k}: ids, logp, log_residual are {shapes}")
        if len(key) != KEY_BYTES or len(row.ids_hash) != HASH_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes and an ids_hash {HASH_BYTES}")
        where = f"{self._folder}: sample {key.hex()}"
        for name, values in (("log-probs", row.logp_PK), ("log residual", row.log_residual_P)):
            # -inf is a probability of 0; rounding may leave log 1 slightly above 0.
            if np.isnan(values).any() or (np.asarray(values) > 1e-3).any():
                raise UserError(f"{where}: its {name} are not all numbers <= 0, nothing of it was stored")
        if not np.isfinite(row.sum_logp):
            raise UserError(f"{where}: its summed log-prob is {row.sum_logp}, nothing of it was stored")
        low, high = int(np.min(row.ids_PK)), int(np.max(row.ids_PK))
        if low < 0 or high >= self._manifest.vocab_size:
            worst = low if low < 0 else high
            raise UserError(f"{where}: id {worst} is outside the vocabulary of {self._manifest.vocab_size}")
