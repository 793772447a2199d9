"""`fusemega align`.

Shape suffixes: S ids of SOURCE's vocabulary.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer


def command(
    source: Annotated[str, typer.Argument(help="The tokenizer whose ids are mapped: a teacher's folder or hub id.")],
    target: Annotated[
        str, typer.Argument(help="The tokenizer that they are mapped to: folder or hub id of the model to be trained.")
    ],
    out: Annotated[Path, typer.Argument(help="File to write; only an older map is replaced.")],
    kind: Annotated[
        str,
        typer.Option(
            help="What a token maps to: cells (the set of TARGET's tokens with which the same text can go on). Or, if "
            "TARGET has no token of the same bytes: first_piece (the first piece that TARGET writes it with), exact "
            "(nothing), mined (the nearest by edit distance), ms (the token that most often ends at the same byte in a "
            "corpus). ms_reference is FuseChat's rule as released."
        ),
    ] = "cells",
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Corpus to count tokens in, as data.path of a run file. ms and ms_reference need one; "
            "coverage is also reported for it. May be repeated."
        ),
    ] = None,  # fmt: skip
    seq_length: Annotated[
        int, typer.Option(min=2, help="Length in tokens of the windows that documents are cut into.")
    ] = 2048,
    on_bad_row: Annotated[
        str, typer.Option(help="error (stop at an unusable row) or skip (leave it out and count it).")
    ] = "error",
    unknown_fields: Annotated[
        str,
        typer.Option(
            help="What to do with unknown fields in --data: error, or ignore (leave them out and count them)."
        ),
    ] = "error",
    positions: Annotated[
        str | None,
        typer.Option(
            help="Which pairs of tokens ms and ms_reference count: offsets (tokens that end at the same byte; "
            "default of ms) or dtw_reference (FuseChat's warped path; default of ms_reference)."
        ),
    ] = None,  # fmt: skip
    ties: Annotated[
        str | None,
        typer.Option(
            help="How mined chooses among equally near tokens: lowest_id (default) or cooccurrence (the most "
            "similar neighbours in --data)."
        ),
    ] = None,  # fmt: skip
    workers: Annotated[
        int | None, typer.Option(min=1, help="Number of threads or processes; default: one for each core.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Folder for a page about the map; only an older such page is replaced.")
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            help="A store of SOURCE's rows of --data: the page then tells how probable the rows, mapped, make the "
            "text's own next tokens."
        ),
    ] = None,
) -> None:
    """Make a vocabulary map: for each id of SOURCE the corresponding id of TARGET. Reads tokenizers, no weights.

    Prints one JSON object: sizes, the share of SOURCE's tokens that have an id of TARGET (coverage), seconds.
    """
    from fusemega.align.align import align, check
    from fusemega.align.vocabulary_map import VocabularyMap
    from fusemega.files.lock import locked
    from fusemega.report.align_page import write_align_page
    from fusemega.report.align_positions import check_store, rows_through
    from fusemega.report.page import check_out
    from fusemega.runtime.console import say

    check(kind, data or [], on_bad_row, positions, ties, unknown_fields)
    check_store(store, source, bool(data), report is not None)
    VocabularyMap.check_replaceable(out)
    with ExitStack() as held:
        held.enter_context(locked(out))
        if report is not None:
            check_out(report, [out])
            held.enter_context(locked(report))
        settings = (kind, data or [], seq_length, on_bad_row, positions, ties, workers, unknown_fields)
        made = align(source, target, *settings, judge=report is not None)
        if made.map.source == made.map.target:
            say(f"{source} and {target} are the same tokenizer: rows need no map")
        made.map.save(out)
        facts = made.map.statistics
        told = {
            "wrote": str(out),
            "kind": kind,
            "source_ids": len(made.map.table_S),
            "target_ids": made.map.target_size,
            "coverage": round(facts["mapped"] / max(facts["source_tokens"], 1), 6),
            "identical": round(facts["identical"] / max(facts["source_tokens"], 1), 6),
            "seconds": facts["seconds"],
        }
        if "cell_sizes" in facts:
            told["cells"] = sum(facts["cell_sizes"].values())
        if "corpus" in facts:
            told["corpus_tokens"] = facts["corpus"]["tokens"]
            told["corpus_coverage"] = round(facts["corpus"]["mapped"] / max(facts["corpus"]["tokens"], 1), 6)
        if report is not None:
            rows = None if store is None else rows_through(made, out, store)
            told["report"] = str(write_align_page(made, report, rows))
        print(json.dumps(told))
