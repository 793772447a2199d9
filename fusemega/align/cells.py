"""Cells: sets of target ids of which a teacher's row can tell one from the other, but not the ids inside one.

At a shared position, the source's next token and the target's next token begin with the same bytes: they are equal, or
one is the beginning of the other, or they exclude each other. An edge goes from each source token to the piece that
the target begins it with, from each target token to the piece that the source begins it with, between tokens of the
same bytes, and between tokens with which both go on in some text (`probes`). Tokens that edges connect are in one cell.
So a source token and a target token with which the same text can go on are in one cell, and the probability of a cell
is a number that both models can state.

Shape suffixes: S ids of the source's vocabulary, T ids of the target's, E edges, N nodes of a graph.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fusemega.align.make_map import by_role, counted, exact_map, ids_by_content
from fusemega.align.vocabulary import Vocabulary
from fusemega.align.vocabulary_map import VocabularyMap


def cells_map(
    source: Vocabulary,
    target: Vocabulary,
    forward: VocabularyMap,
    backward: VocabularyMap,
    written: tuple[np.ndarray, np.ndarray],
) -> VocabularyMap:
    """The map of kind `cells`. The shortest of a cell's target ids stands for it, of equally short ones the lowest.

    Tokens that begin or end a text or a turn are cells of their own, and so are tokens that no text is made of.

    Args:
        forward: first pieces of the source's tokens in the target's vocabulary (`first_piece_map`); also says what a
            token becomes with a space put before it or taken away.
        backward: first pieces of the target's tokens in the source's vocabulary.
        written: two int64 [E], ids of source and target with which the tokenizers go on at the same place of some text
            (`fusemega.align.probes.next_tokens`).
    """
    own = by_role(source, target)
    alone_S, alone_T = np.zeros(source.size, dtype=bool), np.zeros(target.size, dtype=bool)
    alone_S[list(own)] = True
    alone_T[[i for i in (target.bos_id, target.eos_id, target.closing_id) if i is not None]] = True
    # No text has these: byte tokens whose byte another token has, for example.
    written_as = ids_by_content(target)
    alone_T[[i for i, content in enumerate(target.contents) if content is not None and written_as[content] != i]] = True
    same = _edges(exact_map(source, target).table_S)
    edges = [same, _edges(forward.table_S), _edges(backward.table_S)[::-1], written]
    source_E, target_E = (np.concatenate([edge[side] for edge in edges]) for side in (0, 1))
    inside_E = ~alone_S[source_E] & ~alone_T[target_E]
    label_N = components(source.size + target.size, source_E[inside_E], source.size + target_E[inside_E])
    label_T = label_N[source.size :]
    cell_T = representatives(label_T, np.array([len(content or b"") for content in target.contents]))
    of_label = dict(zip(label_T.tolist(), cell_T.tolist(), strict=True))

    def of_cell(table_S: np.ndarray) -> np.ndarray:
        return np.where(table_S >= 0, cell_T[table_S], -1).astype(np.int32)

    table_S = of_cell(forward.table_S)
    # A token that no target token begins like may itself begin one.
    lacking_S = (table_S < 0) & ~alone_S
    table_S[lacking_S] = [of_label.get(label, -1) for label in label_N[: source.size][lacking_S].tolist()]
    statistics = {"target_tokens_reached": int(np.isin(cell_T, table_S).sum()), **_sizes(cell_T)}
    tables = table_S, of_cell(forward.marked_S), of_cell(forward.unmarked_S)
    return replace(counted("cells", source, target, *tables, statistics), cell_T=cell_T)


def identity_map(vocabulary: Vocabulary) -> VocabularyMap:
    """The map of kind `cells` between a vocabulary and itself: each id, special ones too, is itself and alone."""
    own_S = np.arange(vocabulary.size, dtype=np.int32)
    return replace(counted("cells", vocabulary, vocabulary, own_S, own_S, own_S, _sizes(own_S)), cell_T=own_S)


def components(size: int, left_E: np.ndarray, right_E: np.ndarray) -> np.ndarray:
    """int64 [N]: for each node of a graph the lowest node that edges connect it with.

    >>> components(5, np.array([4, 1]), np.array([2, 4])).tolist()
    [0, 1, 1, 3, 1]
    """
    label_N = np.arange(size)
    while True:
        left, right = label_N[left_E], label_N[right_E]
        if (left == right).all():
            return label_N
        np.minimum.at(label_N, np.maximum(left, right), np.minimum(left, right))
        while (label_N[label_N] != label_N).any():
            label_N = label_N[label_N]


def representatives(label_T: np.ndarray, length_T: np.ndarray) -> np.ndarray:
    """int32 [T]: for each id the shortest id of the same label; of equally short ones the lowest.

    >>> representatives(np.array([7, 7, 9, 7]), np.array([2, 1, 5, 1])).tolist()
    [1, 1, 2, 1]
    """
    order = np.lexsort((length_T, label_T))  # stable: then by id
    _, first, inverse = np.unique(label_T[order], return_index=True, return_inverse=True)
    cell_T = np.empty(len(label_T), dtype=np.int32)
    cell_T[order] = order[first][inverse]
    return cell_T


def _sizes(cell_T: np.ndarray) -> dict[str, dict[str, int]]:
    """Number of target ids in a cell -> number of such cells, for a map's statistics."""
    sizes, counts = np.unique(np.unique(cell_T, return_counts=True)[1], return_counts=True)
    return {"cell_sizes": dict(zip(map(str, sizes.tolist()), counts.tolist(), strict=True))}


def _edges(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ids that have an entry, and the entries."""
    ids = np.flatnonzero(table >= 0)
    return ids, table[ids].astype(np.int64)
