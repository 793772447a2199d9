"""`fusemega show`: a look inside what a run file names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fusemega.cli.run_options import OVERRIDES, RUN_FILE
from fusemega.errors import UserError
from fusemega.runtime.console import tell

if TYPE_CHECKING:
    from fusemega.training.run_file import TrainRun

app = typer.Typer(no_args_is_help=True, help="A look inside a run file: data, layout, teachers' rows, keys, stages.")

HTML = Annotated[Path | None, typer.Option(help="Write an HTML page there instead; it must not exist yet.")]
ROW = Annotated[
    str | None,
    typer.Option(help="Row of the data: its number, counted from 1, or FILE:NUMBER as errors print it.", metavar="ROW"),
]


@app.command("data")
def data(
    run_file: RUN_FILE,
    overrides: OVERRIDES = None,
    row: ROW = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="List every token: id, text, where it ends.")] = False,
    html: HTML = None,
) -> None:
    """A row of the data of RUN_FILE: its samples with the supervised tokens marked, and how samples are packed.

    Without --row, the first row. Nothing is allocated; tokenized data go to the cache, where a run will look for them.
    """
    from fusemega.inspect.data import show_data
    from fusemega.inspect.page import show

    show(show_data(_run(run_file, overrides), row, tokens), f"{run_file}: data", html)


@app.command("layout")
def layout(
    run_file: RUN_FILE,
    overrides: OVERRIDES = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Processes; as few as possible if left out.")] = None,
    html: HTML = None,
) -> None:
    """Which rank of RUN_FILE's layout holds which layers, what it reads of the weights, and its share of an update."""
    from fusemega.inspect.layout import show_layout
    from fusemega.inspect.page import show

    show(show_layout(_run(run_file, overrides), nproc), f"{run_file}: layout", html)


@app.command("teacher")
def teacher(
    path: Annotated[Path, typer.Argument(help="A run file with objective distill or fuse, or the folder of a store.")],
    overrides: OVERRIDES = None,
    row: ROW = None,
    most: Annotated[int, typer.Option("--top", min=1, help="Most tokens shown of a position.")] = 5,
    data: Annotated[str | None, typer.Option(help="Of a store: file, folder or glob of the rows it scored.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Of a store: the scorer's folder or hub id.")] = None,
    html: HTML = None,
) -> None:
    """What a teacher's stored row says at each supervised token of a row of data, as text with probabilities.

    For a run file, ids are those of the model in training, mapped through the vocabulary map if there is one.
    """
    from fusemega.inspect.page import show
    from fusemega.inspect.teacher import show_stored, show_taught

    if path.is_dir():
        if data is None or tokenizer is None or overrides:
            raise UserError(f"{path}: of a store, --data and --tokenizer are needed, and KEY=VALUE has no effect")
        drawings = show_stored(path, data, tokenizer, row, most)
    else:
        if data is not None or tokenizer is not None:
            raise UserError(f"{path}: a run file names its data and its model; leave --data and --tokenizer out")
        drawings = show_taught(_run(path, overrides), row, most)
    show(drawings, f"{path}: teacher", html)


@app.command("stages")
def stages(
    recipe_file: Annotated[Path, typer.Argument(help="YAML recipe, as of fusemega run.", metavar="RECIPE")],
    overrides: OVERRIDES = None,
    html: HTML = None,
) -> None:
    """The stages of RECIPE: what each needs, reads and makes, and its command. Writes nothing.

    `fusemega run RECIPE --dry-run` says which of them would run now, and why.
    """
    from rich.text import Text

    from fusemega.errors import printable
    from fusemega.inspect.page import show
    from fusemega.recipes.registry import read_recipe

    recipe, settings = read_recipe(recipe_file, overrides or [])
    lines = recipe.graph(settings).lines()
    show([Text(printable("\n".join(lines)), no_wrap=True, overflow="ignore")], f"{recipe_file}: stages", html)


@app.command("key")
def key(
    key: Annotated[str, typer.Argument(metavar="HASH", help="A sample's key in hex digits, or how it begins.")],
    run_file: RUN_FILE,
    overrides: OVERRIDES = None,
) -> None:
    """The row (file:row) of the sample with the key HASH, searched in the data of RUN_FILE and its held-out text."""
    from fusemega.inspect.rows import Rows, samples_of_key

    run = _run(run_file, overrides)
    sections = {"data": run.data, **({} if run.evaluation is None else {"evaluation.data": run.evaluation.data})}
    lines, searched = [], []
    for name, section in sections.items():
        dataset = Rows.of(run, section).dataset
        searched.append(f"{len(dataset)} of {name}")
        lines += [f"{dataset[i].source}  {dataset[i].key.hex()}  {name}" for i in samples_of_key(dataset, key)]
    if not lines:
        raise UserError(f"{key}: no sample has a key that begins so (searched: {', '.join(searched)})")
    for line in lines:
        tell(line)


def _run(run_file: Path, overrides: list[str] | None) -> TrainRun:
    from fusemega.config import load
    from fusemega.training.run_file import TrainRun

    return load(TrainRun, run_file, overrides or [])
