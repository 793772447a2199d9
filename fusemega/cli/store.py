"""`fusemega store`: inspect, verify and merge sample stores."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fusemega.errors import UserError, choose
from fusemega.runtime.console import tell

app = typer.Typer(no_args_is_help=True, help="Sample stores: inspect, verify, merge.")


@app.command("inspect")
def inspect(
    path: Path, as_json: Annotated[bool, typer.Option("--json", help="One JSON object, on one line.")] = False
) -> None:
    """Show whose rows the store PATH holds, how many, their size, and how well the scorer predicts the samples.

    Cross-entropies are means in nats at temperature 1, for each token of the scorer's own tokenizer and for each byte
    of text. Those for a byte are comparable between tokenizers. Rows are not read; use `verify` for that.
    """
    from fusemega.store.inspect import describe

    found = describe(path)
    if as_json:
        typer.echo(json.dumps(found))
        return
    width = max(map(len, found))
    for name, value in found.items():
        shown = f"{value:.6g}" if isinstance(value, float) else "none" if value is None else value
        tell(f"{name:{width}}  {shown}")


@app.command("merge")
def merge(out: Path, sources: list[Path]) -> None:
    """Write all rows of the stores SOURCES to a new store OUT, which appears complete or not at all.

    The stores must be of one scorer: the same weights, tokenizer, template, windows, temperature and kind of rows. A
    sample that is in several stores must have the same row in each.
    """
    from fusemega.files.output import new_folder, refuse_existing
    from fusemega.store import merge as merging

    stores = merging.open_inputs(sources)
    refuse_existing(out)
    with new_folder(out) as temporary:
        written, repeated = merging.merge(stores, temporary)
    tell(f"wrote {out}: {written} samples of {len(stores)} stores; {repeated} repeated samples left out")


@app.command("verify")
def verify(
    path: Path,
    data: Annotated[
        str | None, typer.Option(help="File, folder or glob of rows: check that each sample has its row in the store.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub id of the scorer, whose tokenizer reads --data.")
    ] = None,
    unknown_fields: Annotated[
        str,
        typer.Option(
            help="What to do with unknown fields in --data: error, or ignore (leave them out and count them)."
        ),
    ] = "error",
    max_length: Annotated[
        int | None, typer.Option(help="Most tokens of a response with its prompt: data.max_length of the teach run.")
    ] = None,
    truncation: Annotated[
        str | None,
        typer.Option(
            help="What became of responses that are too long, data.truncation of the teach run: keep_start (default), "
            "keep_end or drop."
        ),
    ] = None,
) -> None:
    """Read every row of the store PATH; check its checksum and that it is a distribution over the scorer's vocabulary
    (of a store of rows: none, that its sums are those of log-probabilities).

    Prints one JSON object. Exit status 1 if a sample of --data has no row, or a row of other token ids.
    """
    if (data is None) != (tokenizer is None):
        raise UserError("store verify: --data and --tokenizer belong together")
    if data is None and (max_length is not None or truncation is not None):
        raise UserError("store verify: --max-length and --truncation say how --data is read; it is not given")
    choose("--unknown-fields", unknown_fields, ("error", "ignore"))
    from fusemega.store import Store
    from fusemega.store.samples import scored_samples
    from fusemega.store.verify import coverage, verify_rows
    from fusemega.text.tokenizer import Tokenizer

    store = Store.open(path)
    samples = None
    if data is not None and tokenizer is not None:
        reading = {"unknown_fields": unknown_fields, "max_length": max_length, "truncation": truncation}
        samples = scored_samples(store, data, Tokenizer.load(tokenizer), **reading)
    found = {"path": str(path), "rows": verify_rows(store)}
    if samples is None:
        typer.echo(json.dumps(found))
        return
    covered = coverage(store, samples)
    typer.echo(json.dumps(found | asdict(covered)))
    if covered.missing or covered.other_tokenization:
        raise typer.Exit(1)
