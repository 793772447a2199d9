"""Sparse distributions over the target's ids: a few listed ids a position, and the mass of all others.

Shapes: P positions, K listed ids, J teachers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Tail = Literal["renormalise", "residual"]


@dataclass(frozen=True)
class Targets:
    """One distribution a position, at the temperature that training uses.

    Attributes:
        ids_PK: int64; -1 lists nothing. No id stands twice in a row.
        logp_PK: fp32; -inf where nothing is listed.
        log_residual_P: fp32, log of the mass of all ids that are not listed; -inf for none.
        mask_P: bool; False: the position is taught nothing.
    """

    ids_PK: np.ndarray
    logp_PK: np.ndarray
    log_residual_P: np.ndarray
    mask_P: np.ndarray

    @classmethod
    def nothing(cls, positions: int, k: int) -> Targets:
        """Positions that are taught nothing."""
        return cls(
            np.full((positions, k), -1, dtype=np.int64),
            np.full((positions, k), -np.inf, dtype=np.float32),
            np.full(positions, -np.inf, dtype=np.float32),
            np.zeros(positions, dtype=bool),
        )


def renormalised(targets: Targets) -> Targets:
    """The listed ids' share of one another: what lay outside is shared out in proportion (FuseLLM, FuseChat)."""
    total_P = _log_sum(targets.logp_PK)
    listed_P = targets.mask_P & (total_P > -np.inf)
    logp_PK = targets.logp_PK - np.where(listed_P, total_P, 0.0)[:, None]
    return Targets(targets.ids_PK, logp_PK.astype(np.float32), np.full_like(targets.log_residual_P, -np.inf), listed_P)


def mixture(parts: Sequence[Targets], weights_JP: np.ndarray) -> Targets:
    """sum_j w_j P_j at each position, over the teachers that have a distribution there.

    An id that several list gets the sum of what they give it. One that a teacher does not list is a part of its
    residual, and stays a part of the mixture's.

    Args:
        weights_JP: not negative; of each position only those of teachers with a distribution count, scaled to sum to 1.
    """
    present_JP = np.stack([part.mask_P for part in parts])
    weights_JP = np.where(present_JP, np.asarray(weights_JP, dtype=np.float64), 0.0)
    total_P = weights_JP.sum(0)
    mask_P = total_P > 0
    with np.errstate(divide="ignore"):  # log 0 = -inf is a weight of nothing
        log_weights_JP = np.log(weights_JP) - np.log(np.where(mask_P, total_P, 1.0))
    logps = [part.logp_PK + weight_P[:, None] for part, weight_P in zip(parts, log_weights_JP, strict=True)]
    residual_JP = np.stack([part.log_residual_P for part in parts]) + log_weights_JP
    ids_PK, logp_PK = sum_duplicates(np.concatenate([part.ids_PK for part in parts], 1), np.concatenate(logps, 1))
    return Targets(ids_PK, logp_PK, _log_sum(residual_JP.T).astype(np.float32), mask_P)


def sum_duplicates(ids_PK: np.ndarray, logp_PK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each id once a row, with the mass of all its entries, by falling probability; -1 and -inf fill the rows up.

    Entries of id -1 or probability 0 list nothing.

    Returns:
        ids int64 [P, K], logp fp32 [P, K].
    """
    positions, k = ids_PK.shape
    ids_PK = np.where(logp_PK > -np.inf, ids_PK, -1)
    order_PK = np.argsort(ids_PK, axis=1, kind="stable")
    ids_PK = np.take_along_axis(ids_PK, order_PK, 1).astype(np.int64)
    logp_PK = np.take_along_axis(logp_PK, order_PK, 1).astype(np.float64)
    first_PK = np.ones((positions, k), dtype=bool)
    first_PK[:, 1:] = ids_PK[:, 1:] != ids_PK[:, :-1]
    mass_PK = np.where(ids_PK >= 0, np.exp(logp_PK), 0.0)
    sums_PK = np.zeros((positions, k))
    if mass_PK.size:
        sums_PK[first_PK] = np.add.reduceat(mass_PK.ravel(), np.flatnonzero(first_PK))
    ids_PK = np.where(first_PK & (sums_PK > 0), ids_PK, -1)
    order_PK = np.argsort(-np.where(ids_PK >= 0, sums_PK, -1.0), axis=1, kind="stable")
    ids_PK = np.take_along_axis(ids_PK, order_PK, 1)
    with np.errstate(divide="ignore"):
        logp_PK = np.log(np.where(ids_PK >= 0, np.take_along_axis(sums_PK, order_PK, 1), 0.0))
    return ids_PK, logp_PK.astype(np.float32)


def _log_sum(logp_PK: np.ndarray) -> np.ndarray:
    """log of the sum of a row's probabilities, fp64 [P]; -inf where all are 0."""
    with np.errstate(divide="ignore"):
        return np.log(np.exp(logp_PK.astype(np.float64)).sum(1))
