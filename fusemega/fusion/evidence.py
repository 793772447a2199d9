"""How probable a teacher's rows make the text's own next token, by kind of position: a check of a map that costs
nothing.

A useful teacher gives the label much of its probability. Where a map sends it elsewhere, as at positions whose next
token is longer in the target's vocabulary, the label gets next to nothing, and who learns from such rows unlearns these
tokens. The figure to compare with is the unigram's: how frequent the label is at the other positions of the same kind
in the same data. Whoever knows the kind knows something of the label, which a teacher does not: so only rows that give
the label less than half as much are complained of. In a map with cells, a label is the label's cell.

Labels at other positions are no measure: tokens that are longer than the teacher's are rare ones, and even a map that
is wrong at nearly all of them gives them more than their frequency in the whole text.

Shape suffixes: P supervised positions of a sample, K listed ids, V ids of the target's vocabulary, N positions of all
samples, L distinct labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fusemega.align.position_kinds import EQUAL, POSITION_KINDS
from fusemega.fusion.targets import Targets
from fusemega.runtime.console import global_rank, warn
from fusemega.text.dataset import TokenizedDataset, evenly
from fusemega.text.sample import Sample

if TYPE_CHECKING:
    from fusemega.fusion.teacher_store import TeacherStore

_ENOUGH = 50  # positions of a kind, below which its mean says little
_SAMPLES = 64  # looked at when a run begins


@dataclass(frozen=True)
class Evidence:
    """What the rows of some samples say of the labels at the positions of one kind.

    Attributes:
        kind: its name.
        positions: how many of these positions there are.
        share: of all positions that are taught.
        label: mean probability of the label.
        unigram: mean probability that a unigram of the other positions of the kind gives it.
    """

    kind: str
    positions: int
    share: float
    label: float
    unigram: float

    @property
    def is_worse(self) -> bool:
        """Whether the label has less than half of what its frequency gives it, over enough positions to tell."""
        return self.positions >= _ENOUGH and self.label < self.unigram / 2


def probability_of(targets: Targets, ids_P: np.ndarray) -> np.ndarray:
    """A row's probability of one id a position, [P]; 0 if it does not list the id or there is no distribution."""
    listed_PK = targets.ids_PK == np.asarray(ids_P)[:, None]
    return np.where(targets.mask_P, np.where(listed_PK, np.exp(targets.logp_PK), 0.0).sum(1), 0.0)


def kinds_taught(targets: Targets) -> np.ndarray:
    """int8 [P]: the kind of each position, -1 where nothing is taught."""
    kind_P = np.full(len(targets.mask_P), EQUAL, dtype=np.int8) if targets.kind_P is None else targets.kind_P
    return np.where(targets.mask_P, kind_P, -1).astype(np.int8)


def evidence_of(teacher: TeacherStore, samples: Sequence[Sample]) -> list[Evidence]:
    """By kind, of the kinds that these samples have; empty if the store has no row of any.

    Raises:
        UserError: a row that does not fit its sample.
    """
    cell_V = np.arange(teacher.vocab_size) if teacher.cell_V is None else teacher.cell_V
    labels, kinds, probabilities = [np.empty(0, np.int64)], [np.empty(0, np.int8)], [np.empty(0)]
    for sample in samples:
        row = teacher.row(sample, required=False)
        if row is None:
            continue
        targets, cells_P = teacher.targets(row, sample), cell_V[sample.ids[sample.positions + 1]]
        labels.append(cells_P)
        kinds.append(kinds_taught(targets))
        probabilities.append(probability_of(targets, cells_P))
    labels_N, kind_N, label_N = np.concatenate(labels), np.concatenate(kinds), np.concatenate(probabilities)
    taught = max(int((kind_N >= 0).sum()), 1)
    found = []
    for kind, name in enumerate(POSITION_KINDS):
        here_N = kind_N == kind
        if count := int(here_N.sum()):
            counts_L = np.unique(labels_N[here_N], return_counts=True)[1]
            unigram = float((counts_L * (counts_L - 1)).sum()) / max(count * (count - 1), 1)
            found.append(Evidence(name, count, count / taught, float(label_N[here_N].mean()), unigram))
    return found


def spread(dataset: TokenizedDataset, most: int = _SAMPLES) -> list[Sample]:
    """At most so many samples, spread evenly over the data."""
    return [dataset[i] for i in evenly(len(dataset), most)]


def complaints(teacher: TeacherStore, found: Sequence[Evidence]) -> list[str]:
    """A sentence for each kind of position at which the rows say less of the label than half of its frequency."""
    if teacher.map_kind is None:
        through, remedy = "", "is it the store of a good model of this text?"
    else:
        through = f" through {teacher.map_file} (kind {teacher.map_kind})"
        other = "" if teacher.map_kind == "cells" else "make the map with `fusemega align --kind cells`, or "
        remedy = f"{other}leave out positions where the target's token is longer ({teacher.where}.consistent: true)"
    return [
        f"{teacher.store.path}{through}: at positions of kind {each.kind!r} ({each.share:.1%} of those looked at) the "
        f"label has a probability of {each.label:.3f} on average, and its frequency at such positions alone gives it "
        f"{each.unigram:.3f}: these tokens would be unlearnt; {remedy}"
        for each in found
        if each.is_worse
    ]


def warn_of_bad_rows(teacher: TeacherStore, dataset: TokenizedDataset) -> None:
    """Warns, when a run begins, of rows that `complaints` finds fault with; on one rank.

    Raises:
        UserError: a row that does not fit its sample.
    """
    if global_rank() == 0:
        for complaint in complaints(teacher, evidence_of(teacher, spread(dataset))):
            warn(complaint)
