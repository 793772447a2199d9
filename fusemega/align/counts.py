"""Counts how often tokens of two vocabularies are aligned in a corpus, for the statistics-based maps (MS).

FuseChat (arXiv:2402.16107) counts, for each target position, every distinct source token that its warped path aligns
with it, including prompts, templates and padding (`dtw`). The default counts tokens that end at the same byte, in
supervised text only, which is the only text that a map is used on (`offsets`).

Shape suffixes: C pairs, N target tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import numpy as np

from fusemega.align.corpus import Pair, map_pairs, sample_pairs
from fusemega.align.dtw import Strings, dtw_reference
from fusemega.align.pairs import PairCounts, merged
from fusemega.align.positions import shared_positions
from fusemega.errors import UserError
from fusemega.text.dataset import TokenizedDataset
from fusemega.text.sample import Sample


def count_pairs(
    source: TokenizedDataset,
    target: TokenizedDataset,
    by: Literal["offsets", "dtw"] = "offsets",
    strings: tuple[Strings, Strings] | None = None,
    pad_to: int = 0,
    workers: int | None = None,
) -> PairCounts:
    """The pairs of all samples that the two tokenizations share.

    Args:
        source, target: one data set, as `prepare` tokenizes it for each.
        strings: `decoded_strings` of both, for `dtw`.
        pad_to: for `dtw`: tokens that both sequences are padded to; 0: not padded.
        workers: processes; by default as many as there are cores and work for.

    Raises:
        UserError: no sample in common.
    """
    pairs = sample_pairs(source, target)
    if not pairs:
        raise UserError(
            f"none of {len(target)} samples is a sample of both tokenizers: documents longer than seq_length are cut "
            "at different bytes, so raise data.seq_length"
        )
    context = partial(_Corpus, source, target, strings if by == "dtw" else None, pad_to)
    return merged(map_pairs(_count, context, pairs, "counting", workers))


class _Corpus:
    """The data sets that a process keeps open."""

    def __init__(
        self,
        source: TokenizedDataset,
        target: TokenizedDataset,
        strings: tuple[Strings, Strings] | None,
        pad_to: int,
    ) -> None:
        self.source, self.target = source, target
        self.strings, self.pad_to = strings, pad_to

    def pairs(self, source: Sample, target: Sample) -> tuple[np.ndarray, np.ndarray]:
        """Source ids and target ids; those at one place are a pair."""
        if self.strings is None:
            source_ids, source_ends = _supervised(source)
            target_ids, target_ends = _supervised(target)
            in_source, in_target = shared_positions(source_ends, target_ends)
            return source_ids[in_source], target_ids[in_target]
        source_strings, target_strings = self.strings
        source_ids = source_strings.padded(source.ids, self.pad_to)
        target_ids = target_strings.padded(target.ids, self.pad_to)
        first_N, last_N = dtw_reference(source_ids, target_ids, source_strings, target_strings)
        count_N = last_N - first_N + 1
        # One entry for each step of the path: position n with the source tokens first_N[n] to last_N[n].
        position = np.repeat(np.arange(len(target_ids)), count_N)
        step = np.arange(len(position)) + np.repeat(first_N - (np.cumsum(count_N) - count_N), count_N)
        # A source token that a position is aligned with several times counts once.
        distinct = np.unique(np.stack([position, source_ids[step]]), axis=1)
        return distinct[1], target_ids[distinct[0]]


def _supervised(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Ids and ends of the supervised tokens that have text of their own. A space of the template or the tokenizer has
    none: it ends where the token before it does."""
    ends = sample.end_bytes.astype(np.int64)
    before = np.maximum.accumulate(np.append(-1, ends))[:-1]
    kept = sample.supervised & (ends > before)
    return sample.ids[kept], ends[kept]


def _count(corpus: _Corpus, pairs: Sequence[Pair]) -> PairCounts:
    found = [corpus.pairs(corpus.source[s], corpus.target[t]) for s, t in pairs]
    source_C, target_C = (np.concatenate(side).astype(np.int64) for side in zip(*found, strict=True))
    return merged([PairCounts(source_C, target_C, np.ones(len(source_C), dtype=np.int64))])
