"""Sparse distributions over the target's ids: for each position a few listed ids, and the mass of all others.

Shape suffixes: P positions, K listed ids, J teachers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fusemega.align.projection import log_sum, sum_duplicates
from fusemega.text.sample import OF_TEXT, Sample

Tail = Literal["renormalise", "residual"]
TextEnd = Literal["label", "row"]


@dataclass(frozen=True)
class Targets:
    """One distribution a position, at the temperature that training uses.

    Attributes:
        ids_PK: int64; -1 for no entry. Each id occurs at most once in a row, and stands for its cell.
        logp_PK: fp32; -inf where nothing is listed.
        log_residual_P: fp32, log of the mass of all ids that are not listed; -inf for none.
        mask_P: bool; False: the position is taught nothing.
        partition: number of the partition of ids into cells (`fusemega.fusion.partitions`); 0: an id is a cell.
        kind_P: int8, the kind of each position (`fusemega.align.position_kinds`); -1 where tokens do not end together.
            None: the teacher has the target's tokenizer, so all are equal. Of a mixture the last kind of any teacher.
    """

    ids_PK: np.ndarray
    logp_PK: np.ndarray
    log_residual_P: np.ndarray
    mask_P: np.ndarray
    partition: int = 0
    kind_P: np.ndarray | None = None

    @classmethod
    def nothing(cls, positions: int, k: int) -> Targets:
        """Positions that are taught nothing."""
        return cls(
            np.full((positions, k), -1, dtype=np.int64),
            np.full((positions, k), -np.inf, dtype=np.float32),
            np.full(positions, -np.inf, dtype=np.float32),
            np.zeros(positions, dtype=bool),
        )


def text_ends(sample: Sample, eos_id: int | None) -> np.ndarray:
    """bool [P]: the position before the eos of a plain text."""
    after_P = sample.positions + 1
    return sample.is_place(OF_TEXT)[after_P] & (sample.ids[after_P] == eos_id)


def renormalised(targets: Targets) -> Targets:
    """The listed ids scaled to sum to 1; the mass outside them is dropped (FuseLLM, FuseChat)."""
    total_P = log_sum(targets.logp_PK)
    # A position whose listed ids have no mass cannot be scaled to 1, so it is taught nothing.
    listed_P = targets.mask_P & (total_P > -np.inf)
    logp_PK = targets.logp_PK - np.where(listed_P, total_P, 0.0)[:, None]
    return replace(
        targets,
        logp_PK=logp_PK.astype(np.float32),
        log_residual_P=np.full_like(targets.log_residual_P, -np.inf),
        mask_P=listed_P,
    )


def or_label(targets: Targets, labels_P: np.ndarray) -> Targets:
    """Puts the label with probability 1 at positions without a distribution."""
    bare_P = ~targets.mask_P
    ids_PK, logp_PK, log_residual_P = targets.ids_PK.copy(), targets.logp_PK.copy(), targets.log_residual_P.copy()
    ids_PK[bare_P], logp_PK[bare_P], log_residual_P[bare_P] = -1, -np.inf, -np.inf
    ids_PK[bare_P, 0], logp_PK[bare_P, 0] = labels_P[bare_P], 0.0
    return replace(
        targets, ids_PK=ids_PK, logp_PK=logp_PK, log_residual_P=log_residual_P, mask_P=np.ones_like(targets.mask_P)
    )


def mixture(parts: Sequence[Targets], weights_JP: np.ndarray) -> Targets:
    """sum_j w_j P_j at each position, over the teachers that have a distribution there; all in one partition.

    An id that several teachers list gets the weighted sum of their probabilities. For a teacher that does not list it,
    the id is part of the residual, and stays part of the mixture's residual.

    Args:
        weights_JP: not negative. At each position only teachers with a distribution are used; their weights are scaled
            to sum to 1.

    Example: one position, two teachers that each list one id, with weights 1/4 and 3/4.

        >>> def one(id_, p):
        ...     logp, rest = np.log([[p]], dtype=np.float32), np.log([1 - p], dtype=np.float32)
        ...     return Targets(np.array([[id_]]), logp, rest, np.array([True]))
        >>> mixed = mixture([one(3, 0.8), one(5, 0.4)], np.array([[1.0], [3.0]]))
        >>> mixed.ids_PK.tolist(), [f"{p:.2f}" for p in np.exp([*mixed.logp_PK[0], *mixed.log_residual_P])]
        ([[5, 3]], ['0.30', '0.20', '0.50'])
    """
    present_JP = np.stack([part.mask_P for part in parts])
    weights_JP = np.where(present_JP, np.asarray(weights_JP, dtype=np.float64), 0.0)
    total_P = weights_JP.sum(0)
    mask_P = total_P > 0
    with np.errstate(divide="ignore"):  # log 0 = -inf is a weight of nothing
        log_weights_JP = np.log(weights_JP) - np.log(np.where(mask_P, total_P, 1.0))
    logps = [part.logp_PK + weight_P[:, None] for part, weight_P in zip(parts, log_weights_JP, strict=True)]
    residual_JP = np.stack([part.log_residual_P for part in parts]) + log_weights_JP
    logp_PK = np.concatenate(logps, 1)
    # What a teacher of weight 0 lists is no entry.
    ids_PK = np.where(logp_PK > -np.inf, np.concatenate([part.ids_PK for part in parts], 1), -1)
    ids_PK, logp_PK = sum_duplicates(ids_PK, logp_PK)
    number, kind_P = parts[0].partition, _kinds(parts, weights_JP)
    return Targets(ids_PK, logp_PK, log_sum(residual_JP.T).astype(np.float32), mask_P, number, kind_P)


def _kinds(parts: Sequence[Targets], weights_JP: np.ndarray) -> np.ndarray | None:
    """`Targets.kind_P` of a mixture."""
    if all(part.kind_P is None for part in parts):
        return None
    kind_JP = np.stack([np.zeros(part.mask_P.shape, np.int8) if part.kind_P is None else part.kind_P for part in parts])
    return np.where(weights_JP > 0, kind_JP, -1).max(0)
