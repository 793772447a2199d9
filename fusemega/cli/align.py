"""`fusemega align`."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer


def command(
    source: Annotated[str, typer.Argument(help="Whose ids are mapped: a teacher's folder or hub id.")],
    target: Annotated[str, typer.Argument(help="Onto whose ids: the folder or hub id of the model to be trained.")],
    out: Annotated[Path, typer.Argument(help="The map's file; an older map there, and nothing else, is replaced.")],
    kind: Annotated[
        str,
        typer.Option(
            help="first_piece (tokens of the same bytes, else the first of TARGET's pieces of the token), exact (else "
            "none), mined (else the nearest by edit distance), ms (else the most frequent companion in a corpus) or "
            "ms_reference (FuseChat's rule as it was released)."
        ),
    ] = "first_piece",
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Rows to count in, as data.path of a run file; ms and ms_reference need some, and coverage "
            "is told for them. Can be given several times."
        ),
    ] = None,  # fmt: skip
    seq_length: Annotated[int, typer.Option(min=2, help="Tokens of the windows that documents are cut into.")] = 2048,
    on_bad_row: Annotated[str, typer.Option(help="error (stop at an unusable row) or skip (count it).")] = "error",
    unknown_fields: Annotated[
        str, typer.Option(help="What a field of unknown meaning does in --data: error, or ignore (it is counted).")
    ] = "error",
    positions: Annotated[
        str | None,
        typer.Option(
            help="Which tokens ms and ms_reference count as companions: offsets (that end at the same byte; "
            "ms's default) or dtw_reference (FuseChat's; ms_reference's default)."
        ),
    ] = None,  # fmt: skip
    ties: Annotated[
        str | None,
        typer.Option(
            help="Which of equally near tokens mined takes: lowest_id (default) or cooccurrence (the one with "
            "the most similar neighbours in --data)."
        ),
    ] = None,  # fmt: skip
    workers: Annotated[int | None, typer.Option(min=1, help="Threads or processes; by default one a core.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="Folder for a page about the map; an older one, and nothing else, is replaced.")
    ] = None,
) -> None:
    """A vocabulary map: which of TARGET's ids stands for each of SOURCE's. Only tokenizers are read, no weights.

    Prints one JSON object: sizes, the share of SOURCE's tokens that keep an id (coverage), seconds.
    """
    from fusemega.align.align import align, check
    from fusemega.align.vocabulary_map import VocabularyMap
    from fusemega.files.lock import locked
    from fusemega.report.align_page import write_align_page
    from fusemega.report.page import check_out
    from fusemega.runtime.console import say

    check(kind, data or [], on_bad_row, positions, ties, unknown_fields)
    VocabularyMap.check_replaceable(out)
    with ExitStack() as held:
        held.enter_context(locked(out))
        if report is not None:
            check_out(report, [out])
            held.enter_context(locked(report))
        made = align(
            *(source, target, kind, data or [], seq_length, on_bad_row, positions, ties, workers, unknown_fields)
        )
        if made.map.source == made.map.target:
            say(f"{source} and {target} are the same tokenizer: rows of the one are rows of the other without any map")
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
        if "corpus" in facts:
            told["corpus_tokens"] = facts["corpus"]["tokens"]
            told["corpus_coverage"] = round(facts["corpus"]["mapped"] / max(facts["corpus"]["tokens"], 1), 6)
        if report is not None:
            told["report"] = str(write_align_page(made, report))
        print(json.dumps(told))
