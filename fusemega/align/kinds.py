"""The kinds of vocabulary maps by name: the values of `fusemega align --kind`.

A new kind is one function under `@map_kind(name, summary)`, imported at the end of this file. Each function imports the
code that it needs when it is called, so that reading a map does not import it.

Shape suffixes: S ids of the source's vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from fusemega.align.cooccurrence import Neighbours
    from fusemega.align.pairs import PairCounts
    from fusemega.align.vocabulary import Vocabulary
    from fusemega.align.vocabulary_map import VocabularyMap
    from fusemega.text.tokenizer import Tokenizer

Positions = Literal["offsets", "dtw_reference"]
POSITIONS: tuple[Positions, ...] = ("offsets", "dtw_reference")


@dataclass(frozen=True)
class MapInputs:
    """What a kind may use to make a map.

    Attributes:
        tokenizers, vocabularies: those of the source and of the target.
        counts: pairs of ids in a corpus; None unless the kind asks for them.
        neighbours: neighbours of both vocabularies, if they decide between equally near tokens; otherwise None.
        workers: threads; None for one on each core.
        progress: called with the number of tokens that are done, and of all tokens.
    """

    tokenizers: tuple[Tokenizer, Tokenizer]
    vocabularies: tuple[Vocabulary, Vocabulary]
    counts: PairCounts | None = None
    neighbours: tuple[Neighbours, Neighbours] | None = None
    workers: int | None = None
    progress: Callable[[int, int], None] = lambda done, total: None


@dataclass(frozen=True)
class MapKind:
    """A way to make a map.

    Attributes:
        summary: one sentence for readers of a report.
        make: makes the map; its `VocabularyMap.kind` is the name that the kind is registered under.
        counts: which positions of a corpus count as pairs by default; None for a kind that needs no corpus.
        cells: whether its maps have cells of target ids (`VocabularyMap.cell_T`).
    """

    summary: str
    make: Callable[[MapInputs], VocabularyMap]
    counts: Positions | None = None
    cells: bool = False


KINDS: dict[str, MapKind] = {}


def map_kind(
    name: str, summary: str, counts: Positions | None = None, cells: bool = False
) -> Callable[[Callable[[MapInputs], VocabularyMap]], Callable[[MapInputs], VocabularyMap]]:
    """Decorator: the function makes maps of the kind `name`; see `MapKind` for the other arguments."""

    def add(make: Callable[[MapInputs], VocabularyMap]) -> Callable[[MapInputs], VocabularyMap]:
        KINDS[name] = MapKind(summary, make, counts, cells)
        return make

    return add


@map_kind("cells", "Cells of tokens with which the same text can go on, in either vocabulary.", cells=True)
def _cells(inputs: MapInputs) -> VocabularyMap:
    from fusemega.align.cells import cells_map, identity_map
    from fusemega.align.probes import next_tokens, probe_texts

    (source, target), (source_tokenizer, target_tokenizer) = inputs.vocabularies, inputs.tokenizers
    if source.content_hash == target.content_hash:
        return identity_map(source)
    forward = _pieces(source, target, source_tokenizer, target_tokenizer)
    backward = _pieces(target, source, target_tokenizer, source_tokenizer)
    written = next_tokens(source_tokenizer, target_tokenizer, probe_texts(inputs.vocabularies))
    return cells_map(source, target, forward, backward, written)


@map_kind("exact", "Tokens that stand for the same bytes.")
def _exact(inputs: MapInputs) -> VocabularyMap:
    from fusemega.align.make_map import exact_map

    return exact_map(*inputs.vocabularies)


@map_kind(
    "first_piece", "Tokens that stand for the same bytes, else the first piece that the target writes the token with."
)
def _first_piece(inputs: MapInputs) -> VocabularyMap:
    return _pieces(*inputs.vocabularies, *inputs.tokenizers)


@map_kind("mined", "Tokens that stand for the same bytes, else the target's nearest by edit distance.")
def _mined(inputs: MapInputs) -> VocabularyMap:
    from fusemega.align.make_map import mined_map

    return mined_map(*inputs.vocabularies, inputs.workers, inputs.progress, inputs.neighbours)


@map_kind(
    "ms", "Tokens that stand for the same bytes, else the token that most often ends at the same byte.", "offsets"
)
def _ms(inputs: MapInputs) -> VocabularyMap:
    from fusemega.align.make_map import ms_map

    assert inputs.counts is not None
    return ms_map(*inputs.vocabularies, inputs.counts)


@map_kind(
    "ms_reference", "FuseChat's statistics as released; a token never seen becomes the unknown token.", "dtw_reference"
)
def _ms_reference(inputs: MapInputs) -> VocabularyMap:
    from fusemega.align.make_map import ms_reference_map

    assert inputs.counts is not None
    return ms_reference_map(*inputs.vocabularies, inputs.counts)


def _pieces(
    source: Vocabulary, target: Vocabulary, source_tokenizer: Tokenizer, target_tokenizer: Tokenizer
) -> VocabularyMap:
    from fusemega.align.make_map import first_piece_map
    from fusemega.align.pieces import before_text, cutter

    written = before_text(source_tokenizer, target_tokenizer, source.contents)
    return first_piece_map(source, target, cutter(target_tokenizer, target), written)
