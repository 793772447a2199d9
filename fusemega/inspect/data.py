"""`fusemega show data`: a row token by token, and how the samples of the first update are packed.

Shape suffixes: L tokens of a sample.
"""

from __future__ import annotations

from itertools import groupby

import numpy as np
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from fusemega.inspect.layout import place_of
from fusemega.inspect.rows import Rows, samples_of_row, token_text
from fusemega.passes.micro_batch import Fields, MicroBatch
from fusemega.text.sample import Sample
from fusemega.text.tokenizer import Tokenizer
from fusemega.training.run_file import TrainRun

_LEARNT, _READ = "bold green", "dim"
_COLOURS = ("cyan", "magenta", "yellow", "blue")
_BAR = 100  # characters of a drawn micro-batch


def show_data(run: TrainRun, row: str | None, tokens: bool) -> list[RenderableType]:
    """The samples of one row, and the micro-batches of the first update.

    Args:
        row: as `samples_of_row` takes it.
        tokens: list every token, with its id and where it ends.

    Raises:
        UserError: the data cannot be read, or has no such row.
    """
    rows = Rows.of(run)
    found = samples_of_row(rows.dataset, row)
    drawings: list[RenderableType] = [Text(rows.dataset.in_words())]
    for number, i in enumerate(found, start=1):
        sample = rows.dataset[i]
        which = f", {number} of {len(found)} samples of the row" if len(found) > 1 else ""
        drawings += [
            "",
            *_sample(sample, rows.tokenizer, which),
            *([_tokens(sample, rows.tokenizer)] if tokens else []),
        ]
    return [*drawings, "", *_packing(run, rows)]


def _sample(sample: Sample, tokenizer: Tokenizer, which: str) -> list[RenderableType]:
    head = Text(f"{sample.source}{which}", style="bold")
    about = (
        f"key {sample.key.hex()}; {len(sample.ids)} tokens, {int(sample.supervised.sum())} of them supervised: "
        f"those in ⟦ ⟧, {sample.num_bytes} bytes of text"
    )
    text = Text()
    for learnt, part in groupby(zip(sample.ids, sample.supervised, strict=True), key=lambda pair: bool(pair[1])):
        written = "".join(token_text(tokenizer, int(token_id)) for token_id, _ in part).replace("⏎", "⏎\n")
        text.append(f"⟦{written}⟧" if learnt else written, _LEARNT if learnt else _READ)
    return [head, Text(about), text]


def _tokens(sample: Sample, tokenizer: Tokenizer) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("position", "id", "token", "supervised", "ends at byte"):
        table.add_column(name, justify="right" if name in ("position", "id", "ends at byte") else "left")
    for i in range(len(sample.ids)):
        learnt, end = bool(sample.supervised[i]), int(sample.end_bytes[i])
        token = Text(repr(token_text(tokenizer, int(sample.ids[i])))[1:-1], _LEARNT if learnt else _READ)
        table.add_row(
            str(i),
            str(sample.ids[i]),
            Text("|").append_text(token).append("|"),
            "yes" if learnt else "",
            str(end) if end >= 0 else "-",
        )
    return table


def _packing(run: TrainRun, rows: Rows) -> list[RenderableType]:
    """The first update as a single data-parallel rank would take it."""
    # Context-parallel ranks share what is drawn here.
    world = place_of(run.parallel, run.parallel.model_parallel_size, 0, whole_rows=True)
    batches = run.batches(rows.dataset, Fields(), rows.source.pad_id, world).step(0).micro_batches
    tokens = sum(batch.tokens.numel() for batch in batches)
    drawings: list[RenderableType] = [
        Text("The first update, on one data-parallel rank", style="bold"),
        Text(
            f"{len(batches)} micro-batch(es) of {tokens} tokens; a colour is a sample, · is padding"
            + (", = is shared by the samples after it" if run.training.share_prefix else "")
        ),
    ]
    for number, batch in enumerate(batches, start=1):
        drawings += _micro_batch(number, batch)
    return drawings


def _micro_batch(number: int, batch: MicroBatch) -> list[RenderableType]:
    lengths, total = np.diff(batch.bounds), batch.tokens.numel()
    supervised = batch.sequence_tokens.tolist()
    bar, legend = Text(), Text()
    prompts = {start for start, end in batch.prefixes if end > start}
    segments = zip(batch.bounds, lengths.tolist(), strict=False)
    i = -1  # the sample
    for start, length in segments:
        width = max(1, round(_BAR * length / total))
        if start in prompts:
            bar.append("=" * width)
            legend.append(f"{'  ' if start else ''}{length} shared by")
            continue
        i += 1
        if i >= len(batch.sources):
            bar.append("·" * width)
            legend.append(f"  {length} of padding")
            continue
        colour = _COLOURS[i % len(_COLOURS)]
        bar.append("█▓▒░"[i % 4] * width, colour)
        legend.append(f"{'  ' if start else ''}{batch.sources[i]}", colour)
        legend.append(f" {length} ({supervised[i]} supervised)")
    grouped = (
        ""
        if len(batch.group_sizes) == len(batch.sources)
        else f" in {len(batch.group_sizes)} groups of " + (", ".join(map(str, batch.group_sizes.tolist())))
    )
    head = Text(f"micro-batch {number}: {total} tokens, {len(batch.sources)} samples{grouped}")
    return [head, bar, legend]
