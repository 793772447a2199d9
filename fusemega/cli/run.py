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
            help="YAML recipe; examples/fusellm and examples/fusechat have commented ones.", metavar="RECIPE"
        ),
    ],
    overrides: OVERRIDES = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print which stages would run, why, and their commands; run none.")
    ] = False,
) -> None:
    """Run a recipe: several commands in order, each once, and again when what it was made from has changed.

    The key `recipe` of the file names the kind of recipe. Every stage that runs a model has a run file in the recipe's
    output_dir and can be run by hand. Run the same command again to continue after an interruption. After a stage
    fails, those that need it do not run; the others still do, and the exit status is 2.
    """
    from fusemega.pipeline.verdict import plan_lines
    from fusemega.recipes.registry import read_recipe, run_recipe

    recipe, settings = read_recipe(recipe_file, overrides or [])
    for line in plan_lines(recipe.graph(settings)) if dry_run else run_recipe(recipe, settings):
        tell(line)
