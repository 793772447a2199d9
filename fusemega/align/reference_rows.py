"""The published projection of a source's rows to the target's positions, reproduced exactly.

After FuseChat (arXiv:2402.16107; FuseAI, FuseChat/utils/align_token_and_vocab.py). `dtw_reference` aligns a target
position with one or more source steps. The position learns from the row of one step, or from its own label alone:

* exact (EM) and mined (MinED): with one step, from that step if both strings are equal, or (MinED) if the map takes the
  step's token to the position's token. With several steps, or different strings, from its label.
* ms (MS), ms_reference: from the first step for which one of the two strings is a suffix of the other, else from its
  label. The published code has two more rules for several steps: the position's string begins with the steps' strings
  in order; or one of it and their concatenation is a suffix of the other. They are never reached, because then the last
  of these strings would already be a suffix.

The entries of a row are read by falling probability. An entry gets the id of the identical string, else the id that the
map gives, else none. Of several entries with one id the first is kept and the others are dropped. The remaining ones
are scaled to sum to 1. If no entry of a row remains, the target's own row is used.

FuseLLM (arXiv:2401.10491; FuseLLM/src/utils/others.py) has only EM and MinED. Its label is the position's own token,
which the model has already read, instead of the next one (FuseAI's issues 27 and 28).

Problems of this method, which `positions` with `projection` do not have: the path depends on the spelling of tokens, so
positions that have read different text are aligned; an empty string (a marker by itself) is a suffix of every string;
SentencePiece's words lose their space on decoding and byte-level ones keep it, so under EM hardly any are equal; the
mass of equal ids, and of ids without a counterpart, is lost; a position without a match learns its label alone.

Shape suffixes: N target tokens, P target positions that predict a supervised token, K ids of a row, S ids of the
source's vocabulary, C ids to fill up with.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fusemega.align.dtw import Strings, dtw_reference
from fusemega.store import Row

if TYPE_CHECKING:
    from fusemega.align.vocabulary import Vocabulary
    from fusemega.align.vocabulary_map import VocabularyMap
    from fusemega.text.sample import Sample

_LABEL = -1


@dataclass(frozen=True)
class Aligner:
    """Two vocabularies with their map, as the reference uses them.

    Attributes:
        kind: kind of the map.
        source, target: their tokens as strings.
        table_S: int32, the target id that an entry of a row gets, or -1.
        map_S: int32, the target id of a token in the map, or -1.
        pad_to: tokens that both sequences are padded to before they are aligned, as FuseChat does; 0: not padded.
    """

    kind: str
    source: Strings
    target: Strings
    table_S: np.ndarray
    map_S: np.ndarray
    pad_to: int

    @classmethod
    def of(
        cls,
        source: Vocabulary,
        source_strings: Strings,
        target: Vocabulary,
        target_strings: Strings,
        vocabulary_map: VocabularyMap,
        pad_to: int = 0,
        rows: int = 0,
    ) -> Aligner:
        """From two vocabularies, their strings by the same rules, and a map from the first to the second.

        Args:
            rows: number of rows of the source's model. Those beyond the ids of its tokenizer map to nothing.
        """
        ids = {form: i for i, form in enumerate(target.forms) if form}
        identical_S = np.array([ids.get(_remarked(form, source.marker, target.marker), -1) for form in source.forms])
        is_exact = vocabulary_map.kind == "exact"
        table_S = identical_S if is_exact else np.where(identical_S >= 0, identical_S, vocabulary_map.table_S)
        table_S = np.pad(table_S.astype(np.int32), (0, max(0, rows - len(table_S))), constant_values=-1)
        return cls(vocabulary_map.kind, source_strings, target_strings, table_S, vocabulary_map.table_S, pad_to)

    def steps(self, source_ids: np.ndarray, target_ids: np.ndarray) -> np.ndarray:
        """int64 [N]: the source step that each target position learns from, or -1: from its label."""
        length = len(target_ids)
        source_ids, target_ids = (
            self.source.padded(source_ids, self.pad_to),
            self.target.padded(target_ids, self.pad_to),
        )
        first_N, last_N = dtw_reference(source_ids, target_ids, self.source, self.target)
        known: dict[tuple[int, int], bool] = {}
        step_N = np.full(len(target_ids), _LABEL)
        for n, (t, first, last) in enumerate(zip(target_ids.tolist(), first_N.tolist(), last_N.tolist(), strict=True)):
            if first < last and not self.kind.startswith("ms"):
                continue
            for j in range(first, last + 1):
                pair = (int(source_ids[j]), t)
                if pair not in known:
                    known[pair] = self._agree(*pair)
                if known[pair]:
                    step_N[n] = j
                    break
        return step_N[:length]

    def _agree(self, source_id: int, target_id: int) -> bool:
        ours = self.target.of_id[target_id]
        theirs = _remarked(self.source.of_id[source_id], self.source.marker, self.target.marker)
        if self.kind.startswith("ms"):
            return theirs.endswith(ours) or ours.endswith(theirs)
        return theirs == ours or (self.kind == "mined" and self.map_S[source_id] == target_id)


def reference_row(aligner: Aligner, source: Sample, target: Sample, row: Row, own: Row) -> tuple[Row, Counter[str]]:
    """A source's row as the reference projects it.

    Args:
        source, target: the same text, tokenized by both.
        row: the source's row of `source`.
        own: the target model's own row of `target`. It is also used if a position's step is not in `row`, which has
            supervised tokens only.

    Returns:
        The row in the target's ids, with what the source's says about the sample as a whole; and how many positions
        learn from the source's `row`, their `label`, or the target's `own` row.
    """
    positions = target.positions
    step_P = aligner.steps(source.ids, target.ids)[positions]
    # One place more than the source has tokens: index -1 (`_LABEL`) and steps into the padding find -1.
    stored = np.full(1 + max(step_P.max(), len(source.ids)), -1)
    stored[source.positions] = np.arange(row.num_tokens)
    is_label_P = step_P == _LABEL
    at_P = stored[step_P]
    k = max(row.ids_PK.shape[1], own.ids_PK.shape[1])
    ids_PK, logp_PK = _widened(*first_wins(row.ids_PK[at_P], row.logp_PK[at_P], aligner.table_S), k)
    identity = np.arange(own.ids_PK.max() + 1)
    own_ids_PK, own_logp_PK = _widened(*first_wins(own.ids_PK, own.logp_PK, identity), k)
    is_own_P = ~is_label_P & ((at_P < 0) | (ids_PK[:, 0] < 0))
    ids_PK[is_own_P], logp_PK[is_own_P] = own_ids_PK[is_own_P], own_logp_PK[is_own_P]
    ids_PK[is_label_P], logp_PK[is_label_P] = -1, -np.inf
    # FuseChat's label is the next token, FuseLLM's the position's own.
    labels_P = target.ids[positions + (aligner.target.rules == "fusechat")]
    ids_PK[is_label_P, 0], logp_PK[is_label_P, 0] = labels_P[is_label_P], 0.0
    projected = Row(
        ids_hash=target.ids_hash,
        end_bytes=target.end_bytes[positions],
        ids_PK=_filled(ids_PK),
        logp_PK=logp_PK,
        log_residual_P=np.full(len(positions), -np.inf, dtype=np.float32),
        sum_logp=row.sum_logp,
        num_bytes=row.num_bytes,
        num_scored=row.num_tokens,
    )
    label, from_own = int(is_label_P.sum()), int(is_own_P.sum())
    return projected, Counter(row=len(positions) - label - from_own, label=label, own=from_own)


def _widened(ids_PK: np.ndarray, logp_PK: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows padded to k entries."""
    more = ((0, 0), (0, k - ids_PK.shape[1]))
    return np.pad(ids_PK, more, constant_values=-1), np.pad(logp_PK, more, constant_values=-np.inf)


def _filled(ids_PK: np.ndarray) -> np.ndarray:
    """Ids of probability 0 in place of padding, none twice in a row: a store's rows list K distinct ids."""
    k = ids_PK.shape[1]
    unused_PC = np.ones((len(ids_PK), 2 * k), dtype=bool)  # at least k of the ids below 2 k are not listed
    rows, columns = np.nonzero((ids_PK >= 0) & (ids_PK < 2 * k))
    unused_PC[rows, ids_PK[rows, columns]] = False
    spare_PK = np.argsort(~unused_PC, axis=1, kind="stable")[:, :k]
    return np.where(ids_PK < 0, spare_PK, ids_PK).astype(np.int32)


def _remarked(text: str, source_marker: str, target_marker: str) -> str:
    return text.replace(source_marker, target_marker) if source_marker else text


def first_wins(ids_PK: np.ndarray, logp_PK: np.ndarray, table_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows in the target's ids as the reference makes them; with the identity as table they are only scaled.

    Args:
        ids_PK, logp_PK: as in `fusemega.store.Row`.

    Returns:
        ids_PK int64 and log-probs float32 that sum to 1 in probability, by falling probability, with -1 and -inf at
        the end; nothing but these where no entry is left.
    """
    order_PK = np.argsort(-logp_PK, axis=1, kind="stable")
    target_PK = np.take_along_axis(table_S[ids_PK].astype(np.int64), order_PK, axis=1)
    logp_PK = np.take_along_axis(logp_PK, order_PK, axis=1).astype(np.float64)
    before = np.tri(target_PK.shape[1], k=-1, dtype=bool)
    seen_PK = ((target_PK[:, :, None] == target_PK[:, None, :]) & before).any(axis=2)
    target_PK[seen_PK] = -1
    logp_PK[target_PK < 0] = -np.inf
    kept_PK = np.argsort(target_PK < 0, axis=1, kind="stable")
    target_PK = np.take_along_axis(target_PK, kept_PK, axis=1)
    logp_PK = np.take_along_axis(logp_PK, kept_PK, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        logp_PK = logp_PK - np.log(np.exp(logp_PK).sum(axis=1, keepdims=True))
    return target_PK, np.where(target_PK < 0, -np.inf, logp_PK).astype(np.float32)
