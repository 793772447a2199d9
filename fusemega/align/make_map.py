"""How each kind of vocabulary map is made.

exact          tokens with the same bytes
first_piece    these, else the first of the pieces into which the target's tokenizer cuts the token
mined          these, else the nearest token by edit distance (FuseLLM's MinED, arXiv:2401.10491)
ms             these, else the token that most often ends at the same byte in a corpus
ms_reference   FuseChat's statistics-based map (arXiv:2402.16107) as FuseAI's align_token_and_vocab.py computes it

FuseLLM and FuseChat compare the tokens' forms in the vocabularies, with the source's word marker replaced by the
target's. Here the bytes that tokens stand for are compared, and for edit distances their text (a marker is a space).
For ASCII this is the same; but the byte-level form of "é" is "Ã©", and `<0xE2>` stands for one byte.

In all kinds except `ms_reference`, roles take precedence over bytes: bos maps to bos, eos to eos, the token that closes
a turn to the target's such token; other special tokens map to nothing. A token that ends texts and turns is treated as
the one that closes a turn. Where a plain text ends, the user of the map treats it as eos (`VocabularyMap.source_eos`).

Shape suffixes: S ids of the source's vocabulary, T ids of the target's, C pairs of a corpus's counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cpdist

from fusemega.align.cooccurrence import Neighbours, most_alike
from fusemega.align.vocabulary import Vocabulary
from fusemega.align.vocabulary_map import VocabularyMap

if TYPE_CHECKING:
    from fusemega.align.pairs import PairCounts


def exact_map(source: Vocabulary, target: Vocabulary) -> VocabularyMap:
    """Ids whose tokens stand for the same bytes; others become nothing."""
    return assembled("exact", source, target, np.full(source.size, -1, dtype=np.int32), {})


def first_piece_map(
    source: Vocabulary,
    target: Vocabulary,
    cut: Callable[[bytes], list[int]],
    before_text: Mapping[int, int] | None = None,
) -> VocabularyMap:
    """Tokens without an identical one become the first piece that the target writes them with, if they begin with it.

    A row says how likely each token is to come next. If the target writes a token in several pieces, the first of
    them comes next: it gets the probability of every token that begins with it. The rule is this project's own.

    Args:
        cut: the target's pieces of a content; `fusemega.align.pieces.cutter` makes it.
        before_text: the first piece of tokens that the target writes otherwise in a text than by themselves, though it
            may have them whole; `fusemega.align.pieces.before_text` makes it.
    """
    index = ids_by_content(target)
    other_S = np.full(source.size, -1, dtype=np.int32)
    for u, content in enumerate(source.contents):
        if content and content not in index and (pieces := cut(content)):
            first = target.contents[pieces[0]]
            if first and content.startswith(first):  # otherwise the first piece is unknown
                other_S[u] = pieces[0]
    return assembled("first_piece", source, target, other_S, {}, before_text or {})


def mined_map(
    source: Vocabulary,
    target: Vocabulary,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    neighbours: tuple[Neighbours, Neighbours] | None = None,
) -> VocabularyMap:
    """Tokens without an identical one become the target's nearest by edit distance; ties go to the lowest id.

    Candidates are all tokens that stand for text; byte tokens (`<0xE2>`) are parts of characters and near to nothing.

    Args:
        workers: threads; by default one for each core.
        progress: called with how many of the tokens without an identical one have been looked up, and their number.
        neighbours: neighbours of both vocabularies, to decide between equally near tokens; see `cooccurrence`.
    """
    from fusemega.align.mined import Nearest  # compiled code, slow to import

    index, roles = ids_by_content(target), by_role(source, target)
    asked = [
        u
        for u, content in enumerate(source.contents)
        if content is not None and u not in roles and u not in source.byte_tokens and content not in index
    ]
    offered = sorted(i for content, i in index.items() if i not in target.byte_tokens)
    nearest_S = np.full(source.size, -1, dtype=np.int32)
    distance_S = np.full(source.size, -1, dtype=np.int64)
    if asked and offered:
        done = 0

        def tell(count: int) -> None:
            nonlocal done
            done += count
            progress(done, len(asked))

        near = Nearest([as_text(target.contents[i]) for i in offered])
        place, distance = near.find([as_text(source.contents[u]) for u in asked], workers, tell)
        ids = np.array(offered)
        nearest_S[asked], distance_S[asked] = ids[place], distance
        if neighbours is not None:
            for u in asked:
                if len(neighbours[0].of(u)[0]):
                    candidates = ids[near.ties(as_text(source.contents[u]), distance_S[u])]
                    nearest_S[u] = most_alike(u, candidates, *neighbours)
    histogram = np.bincount(distance_S[distance_S >= 0]).tolist()
    return assembled("mined", source, target, nearest_S, {"distances": histogram})


def ms_map(source: Vocabulary, target: Vocabulary, counts: PairCounts) -> VocabularyMap:
    """Tokens without an identical one become the target's token with which they are most often paired. Ties go to the
    nearest by edit distance, then to the lowest id. A token that is in no pair becomes nothing.

    To prefer the more frequent pair is this project's choice: the paper says "frequency", but its code prefers the
    rarer pair.
    """
    source_C, target_C, count_C = counts.source_C, counts.target_C, counts.count_C
    has_text_S = np.array([content is not None for content in source.contents])
    has_text_T = np.array([content is not None for content in target.contents])
    kept_C = has_text_S[source_C] & has_text_T[target_C]
    most_S = np.zeros(source.size, dtype=count_C.dtype)
    np.maximum.at(most_S, source_C[kept_C], count_C[kept_C])
    kept_C &= count_C == most_S[source_C]
    source_C, target_C = source_C[kept_C], target_C[kept_C]
    distance_C = _distances(
        [as_text(source.contents[u]) for u in source_C], [as_text(target.contents[p]) for p in target_C]
    )
    return assembled("ms", source, target, _first(source.size, source_C, target_C, distance_C), {})


def ms_reference_map(source: Vocabulary, target: Vocabulary, counts: PairCounts) -> VocabularyMap:
    """FuseChat's rule as its code runs: argmin, over the tokens p that are ever paired with u, of

        sigmoid(count(p, u)) * w * Levenshtein(u', p'),     w = 0.1 where one string contains the other, else 1

    with the word markers taken off (where that leaves nothing of one, both with the target's marker); then bos to bos
    and eos to eos. A token never seen becomes unk, or eos where the target has no unk. The sigmoid grows with the
    count, so at equal distance the rarer pair wins.
    """
    source_C, target_C = counts.source_C, counts.target_C
    stripped = [
        _stripped(source.forms[u], target.forms[p], source.marker, target.marker)
        for u, p in zip(source_C.tolist(), target_C.tolist(), strict=True)
    ]
    weight_C = np.array([0.1 if a in b or b in a else 1.0 for a, b in stripped])
    distance_C = weight_C * _distances([a for a, _ in stripped], [b for _, b in stripped])
    score_C = distance_C / (1.0 + np.exp(-counts.count_C.astype(np.float64)))
    table_S = _first(source.size, source_C, target_C, score_C)
    unseen = target.eos_id if target.unk_id is None else target.unk_id
    if unseen is not None:
        table_S[table_S < 0] = unseen
    for own, other in ((source.bos_id, target.bos_id), (source.eos_id, target.eos_id)):
        if own is not None and other is not None:
            table_S[own] = other
    return counted("ms_reference", source, target, table_S, table_S, table_S, {})


def ids_by_content(vocabulary: Vocabulary) -> dict[bytes, int]:
    """The id that a tokenizer uses for given bytes: the lowest; a byte token only if no other token has them."""
    found: dict[bytes, int] = {}
    for i in sorted(range(vocabulary.size), key=lambda i: (i in vocabulary.byte_tokens, i)):
        content = vocabulary.contents[i]
        if content is not None:
            found.setdefault(content, i)
    return found


def identical(source: Vocabulary, target: Vocabulary) -> np.ndarray:
    """bool [S]: whether the target has a token of the same bytes."""
    index = ids_by_content(target)
    return np.array([content is not None and content in index for content in source.contents])


def as_text(content: bytes | None) -> str:
    """The text of a token; each byte that is not UTF-8 by itself becomes one character (a lone surrogate)."""
    assert content is not None, "a special token has no text"
    return content.decode("utf-8", "surrogateescape")


def by_role(source: Vocabulary, target: Vocabulary) -> dict[int, int]:
    """Source id -> target id of the same role. For a token with two roles the later one here counts: the end of a turn
    rather than that of a text."""
    pairs = [(source.bos_id, target.bos_id), (source.eos_id, target.eos_id), (source.closing_id, target.closing_id)]
    return {own: other for own, other in pairs if own is not None and other is not None}


def assembled(
    kind: str,
    source: Vocabulary,
    target: Vocabulary,
    other_S: np.ndarray,
    statistics: dict[str, Any],
    known: Mapping[int, int] = MappingProxyType({}),
) -> VocabularyMap:
    """The map by role, then by what is `known`, then by identical content, then by `other_S`.

    With a space put before it or taken away, a token becomes the target's token of those bytes, or else what the
    source's own token of those bytes becomes. A token that has no space to lose, or whose form with a space is unknown
    to both, keeps its entry: it is the same text to the reader.
    """
    index, own, roles = ids_by_content(target), ids_by_content(source), by_role(source, target)
    table_S, marked_S, unmarked_S = (np.full(source.size, -1, dtype=np.int32) for _ in range(3))
    for u, content in enumerate(source.contents):
        if u in roles:
            table_S[u] = roles[u]
        elif content is not None:
            table_S[u] = known.get(u, index.get(content, other_S[u]))

    def changed(content: bytes, otherwise: int) -> int:
        return index.get(content, table_S[own[content]] if content in own else otherwise)

    for u, content in enumerate(source.contents):
        if u in roles or content is None:
            marked_S[u] = unmarked_S[u] = table_S[u]
            continue
        marked_S[u] = changed(b" " + content, table_S[u])
        unmarked_S[u] = changed(content[1:], -1) if content.startswith(b" ") else table_S[u]
    return counted(kind, source, target, table_S, marked_S, unmarked_S, statistics)


def counted(
    kind: str,
    source: Vocabulary,
    target: Vocabulary,
    table_S: np.ndarray,
    marked_S: np.ndarray,
    unmarked_S: np.ndarray,
    statistics: dict[str, Any],
) -> VocabularyMap:
    """The map of these tables, with counts of what they do before `statistics`."""
    roles, same_S = by_role(source, target), identical(source, target)
    usable = [u for u, content in enumerate(source.contents) if content is not None or u in roles]
    per_target = np.bincount(table_S[table_S >= 0], minlength=target.size)
    counted = {
        "source_tokens": len(usable),
        "identical": int(same_S.sum()),
        "mapped": int((table_S[usable] >= 0).sum()),
        "target_tokens_reached": int((per_target > 0).sum()),
        # Number of source tokens that share a target token -> number of such target tokens.
        "sharing": {str(n): count for n, count in sorted(Counter(per_target[per_target > 0].tolist()).items())},
    }
    return VocabularyMap(
        kind=kind,
        source=source.content_hash,
        target=target.content_hash,
        table_S=table_S,
        marked_S=marked_S,
        unmarked_S=unmarked_S,
        source_size=source.size,
        target_size=target.size,
        source_marks_start=source.marks_start,
        target_marks_start=target.marks_start,
        source_marks_text=source.marks_text,
        target_marks_text=target.marks_text,
        source_eos=-1 if source.eos_id is None else source.eos_id,
        target_eos=-1 if target.eos_id is None else target.eos_id,
        statistics=counted | statistics,
    )


def _first(size: int, source_C: np.ndarray, target_C: np.ndarray, score_C: np.ndarray) -> np.ndarray:
    """int32 [S]: for each source id its target id of the lowest score, then of the lowest id; -1 where it has none."""
    order = np.lexsort((target_C, score_C, source_C))
    source_C, target_C = source_C[order], target_C[order]
    first = np.flatnonzero(np.diff(source_C, prepend=-1))
    table_S = np.full(size, -1, dtype=np.int32)
    table_S[source_C[first]] = target_C[first]
    return table_S


def _distances(first: list[str], second: list[str]) -> np.ndarray:
    return cpdist(first, second, scorer=Levenshtein.distance, dtype=np.int32) if first else np.empty(0)


def _stripped(source: str, target: str, source_marker: str, target_marker: str) -> tuple[str, str]:
    bare = source.replace(source_marker, "") if source_marker else source
    other = target.replace(target_marker, "") if target_marker else target
    if bare and other:
        return bare, other
    return (source.replace(source_marker, target_marker) if source_marker else source), target
