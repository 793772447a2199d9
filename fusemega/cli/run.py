"""`fusemega run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fusemega.cli.run_options import OVERRIDES
from fusemega.runtime.console import tell


def command(
    recipe_file: Annotated[
        Path,
        typer.Argument(
            help="YAML recipe; examples/fusechat3 and its neighbours have commented ones.", metavar="RECIPE"
        ),
    ],
    overrides: OVERRIDES = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print which stages would run, why, and their commands; run none.")
    ] = False,
    until: Annotated[
        str | None,
        typer.Option("--until", metavar="STAGE", help="Run this stage and what it needs, and leave the rest out."),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="STAGE", help="Run this stage and all that need it again, from nothing."),
    ] = None,
) -> None:
    """Run a recipe: several commands in order, each once, and again when what it was made from has changed.

    The key `recipe` of the file names the kind of recipe. Every stage that runs a model has a run file in the recipe's
    output_dir and can be run by hand. Run the same command again to continue after an interruption. After a stage
    fails, those that need it do not run; the others still do, and the exit status is 2.

    STAGE is a stage's name, or how the names of several begin: `sample` is every `sample-...`. `fusemega show stages`
    lists them.
    """
    from fusemega.pipeline.scope import Scope
    from fusemega.pipeline.verdict import plan_lines
    from fusemega.recipes.registry import read_recipe, run_recipe

    recipe, settings = read_recipe(recipe_file, overrides or [])
    graph = recipe.graph(settings)
    scope = Scope.of(graph, until, start)
    for line in plan_lines(graph, scope) if dry_run else run_recipe(recipe, settings, graph, scope):
        tell(line)
