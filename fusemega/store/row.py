"""A row: what one scorer says about one sample.

Shape suffixes: P positions, K entries of a position, H numbers of a vector.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Row:
    """What a scorer says about the P supervised tokens of one sample, in order; position t predicts token t + 1.

    The K entries of a position come by falling probability. In a store of kind `top_k` they are the K most probable
    tokens; in one of kind `sampled` the distinct tokens among K draws, padded with id -1 and log-prob -inf. In one of
    kind `none` K is 0, so all mass is outside, and no position has an end byte (`of_sum`). One of kind `hidden` has one
    position with no entry, and a vector (`of_hidden`).

    Attributes:
        ids_hash: 8 bytes, `Sample.ids_hash` of the scorer's own ids.
        end_bytes: int32 [P], where position t ends in the canonical stream (-1: nowhere comparable).
        ids_PK: int32, ids of the scorer's vocabulary.
        logp_PK: float32, `top_k`: their log-probs at the manifest's temperature; `sampled`: log(times drawn / K).
        log_residual_P: float32, log of the mass of all other tokens, at that temperature; `sampled`: -inf.
        sum_logp: summed log-prob of the supervised tokens themselves, at temperature 1, in nats.
        num_bytes: UTF-8 bytes of the supervised tokens.
        num_scored: number of the scorer's own tokens that `sum_logp` sums over; None: P.
        label_ids_P: int32, the supervised tokens themselves, in the scorer's vocabulary.
        label_logp_P: float32, their log-probs at temperature 1; read with 11 bits, each off by at most 2^-11 of itself.
            Both are None in stores of format 2, and where nobody knows them (`fusemega project`).
        hidden_H: float32 [H], the vector of a row of kind `hidden`; else None.
    """

    ids_hash: bytes
    end_bytes: np.ndarray
    ids_PK: np.ndarray
    logp_PK: np.ndarray
    log_residual_P: np.ndarray
    sum_logp: float
    num_bytes: int
    num_scored: int | None = None
    label_ids_P: np.ndarray | None = None
    label_logp_P: np.ndarray | None = None
    hidden_H: np.ndarray | None = None

    @classmethod
    def of_hidden(cls, ids_hash: bytes, hidden_H: np.ndarray) -> Row:
        """A row of a store of kind `hidden`: a vector, read as it is given (fp32)."""
        return replace(cls.of_sum(ids_hash, 1, 0.0, 0), hidden_H=np.asarray(hidden_H, dtype=np.float32))

    @classmethod
    def of_sum(cls, ids_hash: bytes, positions: int, sum_logp: float, num_bytes: int) -> Row:
        """A row of a store of kind `none`: what is known of a sample as a whole."""
        nothing = np.empty((positions, 0), dtype=np.int32)
        return cls(
            ids_hash=ids_hash,
            end_bytes=np.full(positions, -1, dtype=np.int32),
            ids_PK=nothing,
            logp_PK=nothing.astype(np.float32),
            log_residual_P=np.zeros(positions, dtype=np.float32),
            sum_logp=sum_logp,
            num_bytes=num_bytes,
        )

    @property
    def num_tokens(self) -> int:
        """P."""
        return len(self.end_bytes)

    @property
    def mean_logp(self) -> float:
        """`sum_logp` per token of the scorer's own tokenizer, in nats."""
        return self.sum_logp / (self.num_scored or self.num_tokens)

    @property
    def cross_entropy(self) -> float:
        """-`mean_logp`: nats per token of the scorer's own tokenizer, at temperature 1."""
        return -self.mean_logp
