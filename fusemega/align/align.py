"""`fusemega align`: makes a vocabulary map from two tokenizers, and from a corpus if the kind of map needs one.

Shape suffixes: S ids of the source's vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from fusemega.align import make_map
from fusemega.align.cooccurrence import Neighbours
from fusemega.align.kinds import KINDS, POSITIONS, MapInputs
from fusemega.align.verdicts import Verdicts, verdicts_of
from fusemega.align.vocabulary import Vocabulary
from fusemega.align.vocabulary_map import VocabularyMap
from fusemega.errors import UserError, choose
from fusemega.files.cache import cache_folder
from fusemega.runtime.console import say
from fusemega.text.data import DataConfig
from fusemega.text.dataset import TokenizedDataset, prepare
from fusemega.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from fusemega.align.pairs import PairCounts

TIES = ("lowest_id", "cooccurrence")
_SAY_SECONDS = 15.0  # between two lines of progress


@dataclass(frozen=True)
class Aligned:
    """A map with what it was made of.

    Attributes:
        frequency_S: int64, how often each source id is a target of the corpus; None without one.
        data: the corpus, in the windows and ids of the target; None without one.
        verdicts: where the map sends its next tokens; None without one.
    """

    map: VocabularyMap
    tokenizers: tuple[Tokenizer, Tokenizer]
    vocabularies: tuple[Vocabulary, Vocabulary]
    frequency_S: np.ndarray | None
    data: TokenizedDataset | None = None
    verdicts: Verdicts | None = None


def check(
    kind: str, data: Sequence[str], on_bad_row: str, positions: str | None, ties: str | None, unknown_fields: str
) -> None:
    """Checks that these options fit together.

    Raises:
        UserError: an unknown name; a corpus that is needed and missing; an option without effect on the kind.
    """
    counting = [name for name, known in KINDS.items() if known.counts]
    choose("--kind", kind, KINDS)
    choose("--on-bad-row", on_bad_row, ("error", "skip"))
    choose("--unknown-fields", unknown_fields, ("error", "ignore"))
    if positions is not None:
        choose("--positions", positions, POSITIONS)
        if kind not in counting:
            raise UserError(f"--positions has no effect with --kind {kind}; it belongs to {' and '.join(counting)}")
    if ties is not None:
        choose("--ties", ties, TIES)
        if kind != "mined":
            raise UserError(f"--ties has no effect with --kind {kind}; it belongs to mined")
    if not data and (kind in counting or ties == "cooccurrence"):
        needs = f"--kind {kind}" if kind in counting else f"--ties {ties}"
        raise UserError(f"{needs} counts tokens in a corpus: give one with --data")


def align(
    source: str,
    target: str,
    kind: str,
    data: Sequence[str] = (),
    seq_length: int = 2048,
    on_bad_row: str = "error",
    positions: str | None = None,
    ties: str | None = None,
    workers: int | None = None,
    unknown_fields: str = "error",
    judge: bool = False,
) -> Aligned:
    """A map from the ids of the tokenizer at `source` to those of the one at `target`.

    Args:
        data: files of rows, as `data.path` of a run file; needed by the kinds that count, else for coverage only.
        seq_length, on_bad_row, unknown_fields: as in `data:` of a run file.
        positions: which tokens count as a pair: those that end at the same byte, or those on one step of the published
            path. By default what the kind is defined with.
        ties: which of equally near tokens `mined` takes.
        workers: threads, or processes where a corpus is read.
        judge: also find where the map sends the next tokens of `data`.

    Raises:
        UserError: as `check`; a tokenizer or data that cannot be used.
    """
    check(kind, data, on_bad_row, positions, ties, unknown_fields)
    begun = time.monotonic()
    rows = {"path": list(data), "seq_length": seq_length, "on_bad_row": on_bad_row}
    rows["unknown_fields"] = unknown_fields
    config = DataConfig.model_validate(rows) if data else None
    tokenizers = Tokenizer.load(source), Tokenizer.load(target)
    source_vocabulary, target_vocabulary = vocabularies = Vocabulary.of(tokenizers[0]), Vocabulary.of(tokenizers[1])
    frequency_S = None
    if config is not None:
        cache = cache_folder() / "data"
        own = prepare(config, tokenizers[0], cache, progress=True)
        frequency_S = frequencies(own, source_vocabulary.size)
    counts = near = other = None
    counted = KINDS[kind].counts
    if config is not None and (counted or ties == "cooccurrence" or judge):
        other = prepare(config, tokenizers[1], cache, progress=True)
        if counted:
            counts = _count(own, other, tokenizers, vocabularies, positions or counted, seq_length, workers)
        if ties == "cooccurrence":
            near = _neighbours(own, other, *vocabularies)
    made = KINDS[kind].make(MapInputs(tokenizers, vocabularies, counts, near, workers, _teller()))
    facts = made.statistics | {"seconds": round(time.monotonic() - begun, 3)}
    if frequency_S is not None:
        same_S = make_map.identical(source_vocabulary, target_vocabulary)
        facts["corpus"] = {
            "tokens": int(frequency_S.sum()),
            "mapped": int(frequency_S[made.table_S >= 0].sum()),
            "identical": int(frequency_S[same_S].sum()),
        }
    judged = verdicts_of(made, own, other) if other is not None and judge else None
    return Aligned(replace(made, statistics=facts), tokenizers, vocabularies, frequency_S, other, judged)


def frequencies(dataset: TokenizedDataset, size: int) -> np.ndarray:
    """int64 [size]: how often each id is a supervised token."""
    counts_S = np.zeros(size, dtype=np.int64)
    for sample in dataset:
        np.add.at(counts_S, sample.ids[sample.supervised], 1)
    return counts_S


def _count(
    source: TokenizedDataset,
    target: TokenizedDataset,
    tokenizers: tuple[Tokenizer, Tokenizer],
    vocabularies: tuple[Vocabulary, Vocabulary],
    positions: str,
    seq_length: int,
    workers: int | None,
) -> PairCounts:
    from fusemega.align.counts import count_pairs

    if positions == "offsets":
        return count_pairs(source, target, workers=workers)
    from fusemega.align.dtw import decoded_strings

    first, second = (decoded_strings(t, v.marker) for t, v in zip(tokenizers, vocabularies, strict=True))
    return count_pairs(source, target, "dtw", (first, second), seq_length, workers)


def _neighbours(
    source: TokenizedDataset, target: TokenizedDataset, source_vocabulary: Vocabulary, target_vocabulary: Vocabulary
) -> tuple[Neighbours, Neighbours]:
    """The vectors of both vocabularies over the tokens that both have; axes are the target's ids."""
    index = make_map.ids_by_content(target_vocabulary)
    axes = [
        np.array([-1 if content is None else index.get(content, -1) for content in vocabulary.contents])
        for vocabulary in (source_vocabulary, target_vocabulary)
    ]
    axes[1][~np.isin(axes[1], axes[0])] = -1
    return (
        Neighbours.count((sample.ids for sample in source), axes[0]),
        Neighbours.count((sample.ids for sample in target), axes[1]),
    )


def _teller() -> Callable[[int, int], None]:
    said = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said > _SAY_SECONDS:
            said = time.monotonic()
            say(f"nearest tokens: {done:,} of {total:,}")

    return tell
