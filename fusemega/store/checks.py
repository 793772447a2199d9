"""Checks that a row agrees with its store's manifest, before it is written and by `store verify`.

Shape suffixes: P positions, K entries of a position, U listed entries of all positions.
"""

from __future__ import annotations

import numpy as np

from fusemega.errors import UserError
from fusemega.store.manifest import Manifest
from fusemega.store.row import Row
from fusemega.store.shard import HASH_BYTES

# fp32 leaves a sum of probabilities this near 1, and log 1 at most this far above 0.
_TOLERANCE = 1e-3


def check_row(row: Row, manifest: Manifest, where: str) -> None:
    """Refuses a row that is no distribution over the manifest's vocabulary.

    Args:
        where: begins the message: the store and the sample.

    Raises:
        UserError: not-a-number, a positive log-prob, probabilities whose sum is not 1, counts that are no whole
            numbers, an id or label beyond the vocabulary, an id twice at one position.
        ValueError: shapes that disagree with each other or with the manifest; padding before an entry; labels in a
            store of format 2.
    """
    if not np.isfinite(row.sum_logp):
        raise UserError(f"{where}: its summed log-prob is {row.sum_logp}")
    if manifest.hidden is not None:
        _check_hidden(row, manifest.hidden.size, where)
        return
    if manifest.rows == "none":
        _check_sum(row, where)
        return
    positions, entries = row.num_tokens, manifest.entries
    shapes = (np.shape(row.ids_PK), np.shape(row.logp_PK), np.shape(row.log_residual_P))
    if positions == 0 or shapes != ((positions, entries), (positions, entries), (positions,)):
        raise ValueError(f"row of {positions} positions, {entries} entries: ids, logp, log_residual are {shapes}")
    if len(row.ids_hash) != HASH_BYTES or np.min(row.end_bytes) < -1:
        raise ValueError(f"an ids_hash has {HASH_BYTES} bytes, and -1 marks a position without an end byte")
    for name, values in (("log-probs", row.logp_PK), ("log residual", row.log_residual_P)):
        # -inf is a probability of 0.
        if np.isnan(values).any() or (np.asarray(values) > _TOLERANCE).any():
            raise UserError(f"{where}: its {name} are not all numbers <= 0")
    p_PK = np.exp(np.asarray(row.logp_PK, dtype=np.float64))
    mass_P = p_PK.sum(1) + np.exp(np.asarray(row.log_residual_P, dtype=np.float64))
    worst = int(np.argmax(np.abs(mass_P - 1)))
    if abs(mass_P[worst] - 1) > _TOLERANCE:
        raise UserError(f"{where}: the probabilities at its position {worst} sum to {mass_P[worst]:.6g}, not to 1")
    listed_PK = row.ids_PK >= 0
    if manifest.rows == "sampled":
        if (np.diff(listed_PK.astype(np.int8)) > 0).any() or (p_PK[~listed_PK] != 0).any():
            raise ValueError("padding (-1, -inf) must follow the entries")
        times_U = p_PK[listed_PK] * entries
        if (np.abs(times_U - np.rint(times_U)) > _TOLERANCE).any() or (times_U < 0.5).any():
            raise UserError(f"{where}: its probabilities are not all multiples of 1 / {entries}, the number of draws")
        # -1 is padding here, but no position may be all padding.
        low = 0 if listed_PK.any(1).all() and np.min(row.ids_PK) >= -1 else -1
    else:
        low = int(np.min(row.ids_PK))
    high = int(np.max(row.ids_PK))
    if low < 0 or high >= manifest.vocab_size:
        raise UserError(f"{where}: id {low if low < 0 else high} is outside the vocabulary of {manifest.vocab_size}")
    _check_labels(row, manifest, where)
    sorted_PK = np.sort(row.ids_PK, axis=1)
    if ((sorted_PK[:, 1:] == sorted_PK[:, :-1]) & (sorted_PK[:, 1:] >= 0)).any():
        raise UserError(f"{where}: it lists an id twice at one position")


def _check_hidden(row: Row, size: int, where: str) -> None:
    if row.hidden_H is None or np.shape(row.hidden_H) != (size,) or row.num_tokens != 1:
        raise ValueError(f"a row of a store of rows: hidden is one that `Row.of_hidden` makes, of {size} numbers")
    if not np.isfinite(row.hidden_H).all():
        raise UserError(f"{where}: its vector has numbers that are not finite")


def _check_sum(row: Row, where: str) -> None:
    known = row.ids_PK.size or row.label_ids_P is not None or row.num_scored is not None or (row.end_bytes != -1).any()
    if row.num_tokens == 0 or known:
        raise ValueError("a row of a store of rows: none is one that `Row.of_sum` makes, of a position at least")
    if row.sum_logp > _TOLERANCE * row.num_tokens:
        raise UserError(f"{where}: its summed log-prob is {row.sum_logp}, more than 0")


def _check_labels(row: Row, manifest: Manifest, where: str) -> None:
    ids_P, logp_P = row.label_ids_P, row.label_logp_P
    if ids_P is None or logp_P is None:
        if ids_P is not logp_P:
            raise ValueError("labels and their log-probs come together")
        return
    if manifest.format == 2:
        raise ValueError("rows of the store format 2 have no labels")
    if np.shape(ids_P) != (row.num_tokens,) or np.shape(logp_P) != (row.num_tokens,):
        raise ValueError(f"row of {row.num_tokens} positions: labels, logp are {np.shape(ids_P)}, {np.shape(logp_P)}")
    if not np.isfinite(logp_P).all() or np.max(logp_P) > _TOLERANCE:
        raise UserError(f"{where}: its labels' log-probs are not all finite numbers <= 0")
    low, high = int(np.min(ids_P)), int(np.max(ids_P))
    if low < 0 or high >= manifest.vocab_size:
        raise UserError(f"{where}: label {low if low < 0 else high} is outside the vocabulary of {manifest.vocab_size}")
