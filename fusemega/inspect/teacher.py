"""`fusemega show teacher`: what a stored row teaches at each position, beside the text.

Shape suffixes: P supervised positions of a sample, K ids of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from fusemega.errors import UserError
from fusemega.fusion.evidence import complaints, evidence_of, spread
from fusemega.fusion.targets import Targets, text_ends
from fusemega.fusion.teacher_store import TeacherStore, TeacherStoreConfig
from fusemega.inspect.rows import Rows, samples_of_row, token_text
from fusemega.losses.distill import Distill
from fusemega.losses.fuse import Fuse
from fusemega.store import Store
from fusemega.store.samples import scored_samples
from fusemega.text.dataset import TokenizedDataset
from fusemega.text.sample import Sample
from fusemega.text.tokenizer import Tokenizer
from fusemega.training.run_file import TrainRun


def show_taught(run: TrainRun, row: str | None, most: int) -> list[RenderableType]:
    """The rows that the run's objective reads of one row of data, in the ids of the model in training.

    Args:
        row: as `samples_of_row` takes it.
        most: the most ids that are shown for a position.

    Raises:
        UserError: the objective reads no such rows, or a store does not fit; no such row of data.
    """
    settings = run.objective
    if isinstance(settings, Distill.Settings):
        configs: list[tuple[str, TeacherStoreConfig]] = [("objective", settings)]
    elif isinstance(settings, Fuse.Settings):
        configs = [(f"objective.teachers.{i}", config) for i, config in enumerate(settings.teachers)]
    else:
        raise UserError(
            f"objective.name: {settings.name} reads no rows in the ids of the model in training; "
            "expected distill or fuse"
        )
    rows = Rows.of(run)
    found = samples_of_row(rows.dataset, row)
    drawings: list[RenderableType] = []
    for where, config in configs:
        common = settings.temperature, settings.tail, settings.text_end
        teacher = TeacherStore(config, where, rows.tokenizer, rows.source.vocab_size, *common)
        through = "" if config.map is None else f", through {config.map}"
        drawings.append(Text(f"{where}: {config.store}{through}", style="bold"))
        drawings += _rows(teacher, [rows.dataset[i] for i in found], rows.tokenizer, most)
        drawings += _by_kind(teacher, rows.dataset)
    return drawings


def show_stored(store: Path, data: str, tokenizer: str, row: str | None, most: int) -> list[RenderableType]:
    """The rows of a store for one row of data, in the scorer's own ids.

    Args:
        data: a file, folder or glob.
        tokenizer: the scorer's folder or hub id.
        row, most: as `show_taught`.

    Raises:
        UserError: a store of another tokenizer, or no such row of data.
    """
    opened, loaded = Store.open(store), Tokenizer.load(tokenizer)
    manifest, dataset = opened.manifest, scored_samples(opened, data, loaded)
    config = TeacherStoreConfig(store=str(store))
    teacher = TeacherStore(config, "store", loaded, manifest.vocab_size, manifest.temperature, "residual")
    found = samples_of_row(dataset, row)
    drawings = _rows(teacher, [dataset[i] for i in found], loaded, most)
    return [Text(str(store), style="bold"), *drawings, *_by_kind(teacher, dataset)]


def _by_kind(teacher: TeacherStore, dataset: TokenizedDataset) -> list[RenderableType]:
    """How probable the rows make the labels, over samples spread over all data."""
    samples = spread(dataset)
    found = evidence_of(teacher, samples)
    if not found:
        return []
    table = Table(box=None, pad_edge=False)
    for name in ("kind of position", "positions", "share", "probability of the label", "of a unigram"):
        table.add_column(name, justify="left" if name == "kind of position" else "right")
    for each in found:
        figures = f"{each.positions:,}", f"{each.share:.1%}", f"{each.label:.3f}", f"{each.unigram:.3f}"
        table.add_row(each.kind, *figures)
    about = (
        f"Over {len(samples)} of {len(dataset)} samples, spread over the data. The kind says whether the text's own "
        "next token ends at the same byte for both tokenizers, or which one's is longer. Unigram: how frequent the "
        "label is at the other positions of the kind."
    )
    bad = [Text(each, style="bold red") for each in complaints(teacher, found)]
    return [Text("How probable the teacher makes the label", style="bold"), table, Text(about, style="dim"), *bad]


def _rows(teacher: TeacherStore, samples: Sequence[Sample], tokenizer: Tokenizer, most: int) -> list[RenderableType]:
    drawings: list[RenderableType] = []
    for sample in samples:
        drawings.append(Text(f"{sample.source}: key {sample.key.hex()}"))
        row = teacher.row(sample, required=False)
        if row is None:
            drawings.append(Text("no row in the store"))
            continue
        drawings.append(
            Text(f"cross-entropy of its own tokens {row.cross_entropy:.3f} nats a token; the label is marked with *")
        )
        targets, ends_P = teacher.targets(row, sample), text_ends(sample, tokenizer.eos_id)
        table = Table(box=None, pad_edge=False)
        for name in ("token", "the teacher's most probable tokens", "others"):
            table.add_column(name, justify="right" if name == "others" else "left")
        for p, position in enumerate(sample.positions.tolist()):
            label = int(sample.ids[position + 1])
            text = Text(f"|{token_text(tokenizer, label)}|", "bold green")
            if not targets.mask_P[p]:
                table.add_row(text, Text(_why_nothing(targets, p, bool(ends_P[p])), "dim"), "")
                continue
            stands = label if teacher.cell_V is None else int(teacher.cell_V[label])
            listed = _listed(targets.ids_PK[p], targets.logp_PK[p], stands, tokenizer, most)
            table.add_row(text, listed, _others(targets.log_residual_P[p]))
        drawings.append(table)
    return drawings


def _why_nothing(targets: Targets, p: int, ends: bool) -> str:
    """Why a position has no target: what is listed there was left out on purpose."""
    if (targets.ids_PK[p] >= 0).any():
        if ends:
            return "the text ends here: its label teaches (text_end: label)"
        return "the target's token is longer than the teacher's: left out (consistent: true)"
    if targets.kind_P is not None and targets.kind_P[p] >= 0:
        return "nothing is known here: none of the teacher's tokens has a counterpart"
    return "nothing is known here: no token of the teacher ends at this byte"


def _listed(ids_K: np.ndarray, logp_K: np.ndarray, label: int, tokenizer: Tokenizer, most: int) -> Text:
    """The most probable ids of a position, and the label (or the id that stands for its cell), wherever it comes."""
    order = [int(k) for k in np.argsort(-logp_K, kind="stable") if ids_K[k] >= 0]
    shown = [k for n, k in enumerate(order) if n < most or ids_K[k] == label]
    text = Text()
    for n, k in enumerate(shown):
        is_label = int(ids_K[k]) == label
        text.append(
            f"{'  ' if n else ''}|{token_text(tokenizer, int(ids_K[k]))}|{'*' if is_label else ''} ",
            "bold green" if is_label else "",
        )
        text.append(f"{np.exp(logp_K[k]):.1%}", "dim")
    return text


def _others(log_residual: float) -> str:
    """The probability of all ids that are not listed."""
    return f"{np.exp(log_residual):.1%}" if np.isfinite(log_residual) else "-"
