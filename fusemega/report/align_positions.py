"""What a map's page tells of whether the map is right, by kind of position: on a text, and in a store's rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fusemega.align.align import Aligned
from fusemega.align.position_kinds import POSITION_KINDS
from fusemega.align.verdicts import VERDICTS, Verdicts
from fusemega.errors import UserError
from fusemega.fusion.evidence import Evidence, complaints, evidence_of, spread
from fusemega.store import Store
from fusemega.text.tokenizer import Tokenizer

Table = tuple[list[str], list[list[str]]]


def check_store(store: Path | None, source: str, with_data: bool, with_report: bool) -> None:
    """Checks, before a map is made, that a store can be looked at through it.

    Raises:
        UserError: no store there, one of another tokenizer than `source`, or an option without effect.
    """
    if store is None:
        return
    lacking = [name for name, given in (("--data", with_data), ("--report", with_report)) if not given]
    if lacking:
        raise UserError(f"--store: its rows are looked at in a text, for the page; give {' and '.join(lacking)} too")
    opened = Store.open(store)
    opened.check({"tokenizer": Tokenizer.load(source).content_hash})
    opened.manifest.require_rows(store)


@dataclass(frozen=True)
class RowsThrough:
    """What the rows of `store`, a folder, say through a map: `found` by kind of position, and what is bad of it."""

    store: str
    found: list[Evidence]
    complaints: list[str]


def rows_through(made: Aligned, path: Path, store: Path) -> RowsThrough:
    """What a store's rows say through a map of the text that the map was made with; at most 64 samples of it.

    Args:
        made: with its data.
        path: the map's file.

    Raises:
        UserError: the store has no row of these samples, or a row does not fit.
    """
    from fusemega.fusion.teacher_store import TeacherStore, TeacherStoreConfig  # imports torch

    assert made.data is not None
    manifest, config = Store.open(store).manifest, TeacherStoreConfig(store=str(store), map=str(path))
    teacher = TeacherStore(
        config, "objective", made.tokenizers[1], made.map.target_size, manifest.temperature, "residual", "label"
    )
    found = evidence_of(teacher, spread(made.data))
    if not found:
        raise UserError(
            f"--store: {store} has no row of the samples of --data that were looked at; give the data that it scored, "
            f"with --seq-length {manifest.truncation}"
        )
    return RowsThrough(str(store), found, complaints(teacher, found))


def verdict_table(judged: Verdicts) -> Table:
    """Head and lines: for each kind its share of the positions, and of its positions those of each verdict."""
    total, lines = max(int(judged.counts_CR.sum()), 1), []
    for name, counts_R in zip(POSITION_KINDS, judged.counts_CR.tolist(), strict=True):
        if count := sum(counts_R):
            lines.append([name, f"{count:,}", f"{count / total:.1%}", *(f"{each / count:.1%}" for each in counts_R)])
    all_R = judged.counts_CR.sum(0).tolist()
    lines.append(["all", f"{sum(all_R):,}", "", *(f"{each / total:.1%}" for each in all_R)])
    return ["kind of position", "positions", "share", *VERDICTS], lines


def evidence_table(found: Sequence[Evidence]) -> Table:
    """Head and lines: for each kind the mean probability of the label, in the rows and by its frequency."""
    head = ["kind of position", "positions", "share", "the rows' probability of the label", "a unigram's"]
    return head, [
        [each.kind, f"{each.positions:,}", f"{each.share:.1%}", f"{each.label:.3f}", f"{each.unigram:.3f}"]
        for each in found
    ]
