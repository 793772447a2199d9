"""Where a map sends the text's own next token, by kind of position: to the target's own next token, or elsewhere.

A first measure of a map, which needs a text but no model. A row's probability goes the same way, so a map that is wrong
at many positions teaches falsely there.

Shape suffixes: M positions that match, C kinds of positions, R verdicts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fusemega.align.corpus import sample_pairs
from fusemega.align.position_kinds import POSITION_KINDS, position_kinds
from fusemega.align.positions import shared_positions
from fusemega.align.vocabulary_map import VocabularyMap
from fusemega.text.dataset import TokenizedDataset, evenly
from fusemega.text.sample import BEGINS

RIGHT, ANOTHER, NOTHING = range(3)
VERDICTS = ("right", "another", "nothing")
_MOST = 1000  # samples: their means differ little from those of more


@dataclass(frozen=True)
class Verdicts:
    """How many positions there are of each kind and verdict.

    Attributes:
        counts_CR: int64 [C, R]; an id counts as right if it is the target's own next token, or stands for its cell.
        samples: how many samples were looked at, of those that the two tokenizations share.
    """

    counts_CR: np.ndarray
    samples: int


def verdicts_of(made: VocabularyMap, source: TokenizedDataset, target: TokenizedDataset, most: int = _MOST) -> Verdicts:
    """Counts over at most so many samples, spread evenly over those that both data sets have.

    The first position of each message is left out: there a token may carry a space that is not in the text, and the
    map has other tables for it.

    Args:
        made: the map, from the source's ids to the target's.
        source, target: one data set, as `prepare` tokenizes it for each.
    """
    pairs = sample_pairs(source, target)
    chosen = evenly(len(pairs), most)
    counts_CR = np.zeros((len(POSITION_KINDS), len(VERDICTS)), dtype=np.int64)
    cell_T = made.cell_T if len(made.cell_T) else np.arange(made.target_size)
    for i in chosen:
        theirs, ours = source[pairs[i][0]], target[pairs[i][1]]
        ends_P = theirs.end_bytes[theirs.positions]
        source_M, target_M = shared_positions(ends_P, ours.end_bytes[ours.positions])
        kind_M = position_kinds(ends_P, source_M, ours, target_M)
        said_M = made.table_S[theirs.ids[theirs.positions[source_M] + 1]]
        own_M = cell_T[ours.ids[ours.positions[target_M] + 1]]
        verdict_M = np.where(said_M < 0, NOTHING, np.where(said_M == own_M, RIGHT, ANOTHER))
        inside_M = ~ours.is_place(BEGINS)[ours.positions[target_M]]
        np.add.at(counts_CR, (kind_M[inside_M], verdict_M[inside_M]), 1)
    return Verdicts(counts_CR, len(chosen))
