"""Maps a source's row to the target's ids: one lookup, no mass lost.

A table of the vocabulary map gives the target's id for each listed id. If several ids map to one, their probabilities
are added; the mass of ids without a counterpart is added to the residual, "any other id". So the total mass is
unchanged. FuseLLM and FuseChat keep the first of several equal ids and rescale the rest
(`fusemega.align.reference_rows`).

Shape suffixes: P positions, K ids of a row, T tables, S ids of the source's vocabulary.
"""

from __future__ import annotations

import numpy as np


def project(
    ids_PK: np.ndarray,
    logp_PK: np.ndarray,
    log_residual_P: np.ndarray,
    tables: np.ndarray,
    choice_P: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows with the target's ids.

    Args:
        ids_PK: integers, ids of the source's vocabulary, each at most once in a row; -1 for no entry.
        logp_PK, log_residual_P: log-probs of these ids, and of all other ids together.
        tables: int32 [S] or [T, S], the target's id of each source id, or -1 for none.
        choice_P: index of the table for each position; None for the first table at all positions.

    Returns:
        ids_PK int64 and logp_PK float32, sorted by falling probability and padded with -1 and -inf; log_residual_P
        float32.

    Example: ids 0 and 2 both map to 7, and id 1 has no counterpart; 0.1 and 0.3 of the mass become the residual.

        >>> ids, logp, residual = project(
        ...     np.array([[0, 1, 2]]), np.log([[0.4, 0.3, 0.2]]), np.log([0.1]), np.array([7, -1, 7], dtype=np.int32)
        ... )
        >>> ids.tolist(), [f"{p:.1f}" for p in np.exp([*logp[0], *residual])]
        ([[7, -1, -1]], ['0.6', '0.0', '0.0', '0.4'])

    Raises:
        IndexError: an id beyond the tables.
    """
    tables_TS = np.atleast_2d(tables)
    choice_P1 = 0 if choice_P is None else np.asarray(choice_P)[:, None]
    target_PK = np.where(ids_PK >= 0, tables_TS[choice_P1, ids_PK], -1)
    listed_PK = np.where(ids_PK >= 0, logp_PK, -np.inf)
    dropped_P = log_sum(np.where(target_PK < 0, listed_PK, -np.inf))
    target_PK, logp_PK = sum_duplicates(target_PK, listed_PK)
    return target_PK, logp_PK, np.logaddexp(log_residual_P, dropped_P).astype(np.float32)


def sum_duplicates(ids_PK: np.ndarray, logp_PK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each id of a row once, with the mass of all its entries; what `project` returns of ids and log-probs.

    Args:
        ids_PK, logp_PK: as in `project`, but an id may occur several times.
    """
    top_P1, mass_PK = _scaled(np.where(ids_PK >= 0, logp_PK, -np.inf))
    # Equal ids become neighbours, in the given order: the first gets the sum, the others are removed.
    ids_PK, mass_PK = _ordered(np.argsort(ids_PK, axis=1, kind="stable"), ids_PK.astype(np.int64), mass_PK)
    is_first_PK = np.ones(ids_PK.shape, dtype=bool)
    is_first_PK[:, 1:] = ids_PK[:, 1:] != ids_PK[:, :-1]
    firsts = np.flatnonzero(is_first_PK)
    sum_PK = np.zeros_like(mass_PK)
    if len(firsts):
        sum_PK.flat[firsts] = np.add.reduceat(mass_PK.ravel(), firsts)
    kept_PK = is_first_PK & (ids_PK >= 0)
    with np.errstate(divide="ignore"):
        summed_PK = np.where(kept_PK, np.log(sum_PK) + top_P1, -np.inf)
    ids_PK = np.where(kept_PK, ids_PK, -1)
    # An entry of probability 0 comes before the padding.
    falling_PK = np.argsort(np.where(kept_PK, -np.maximum(summed_PK, -1e30), np.inf), axis=1, kind="stable")
    ids_PK, summed_PK = _ordered(falling_PK, ids_PK, summed_PK)
    return ids_PK, summed_PK.astype(np.float32)


def log_sum(logp_PK: np.ndarray) -> np.ndarray:
    """log of the sum of each row's probabilities, float64 [P]; -inf where all are 0."""
    top_P1, mass_PK = _scaled(logp_PK)
    with np.errstate(divide="ignore"):
        return np.log(mass_PK.sum(axis=1)) + top_P1[:, 0]


def _scaled(logp_PK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row's largest log-prob [P, 1], and probabilities relative to it: small ones keep their digits. float64."""
    logp_PK = logp_PK.astype(np.float64)
    # Finite even if all entries are -inf: their probabilities are then 0, and not NaN.
    top_P1 = logp_PK.max(axis=1, initial=-1e30, keepdims=True)
    return top_P1, np.exp(logp_PK - top_P1)


def _ordered(order_PK: np.ndarray, *columns_PK: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(np.take_along_axis(column_PK, order_PK, axis=1) for column_PK in columns_PK)
