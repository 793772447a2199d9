"""`fusemega run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fusemega.cli.run_options import OVERRIDES
from fusemega.errors import UserError
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
    only: Annotated[
        str | None,
        typer.Option(
            "--only",
            metavar="STAGE",
            help="Run this stage alone, as a batch job does; what it needs must be finished. Other stages may run "
            "meanwhile.",
        ),
    ] = None,
    begin: Annotated[
        Path | None,
        typer.Option(
            "--begin",
            metavar="FILE",
            help="With --only: begin the stage, and write to FILE what a job script does then (slurm/stage.sbatch).",
        ),
    ] = None,
    end: Annotated[
        bool, typer.Option("--end", help="With --only: write down that the stage is finished, whose command has ended.")
    ] = False,
) -> None:
    """Run a recipe: several commands in order, each once, and again when what it was made from has changed.

    The key `recipe` of the file names the kind of recipe. Every stage that runs a model has a run file in the recipe's
    output_dir and can be run by hand. Run the same command again to continue after an interruption. After a stage
    fails, those that need it do not run; the others still do, and the exit status is 2. `fusemega launch` makes a chain
    of batch jobs of the same recipe; this command then finds its stages finished.

    STAGE is a stage's name, or how the names of several begin: `sample` is every `sample-...`. `fusemega show stages`
    lists them.
    """
    from fusemega.pipeline.scope import Scope
    from fusemega.pipeline.verdict import plan_lines
    from fusemega.recipes.registry import read_recipe, run_recipe, run_stage

    if only is not None and (until is not None or start is not None or dry_run):
        raise UserError("--only: it names the one stage that runs; leave --until, --from and --dry-run out")
    if only is None and (begin is not None or end):
        raise UserError(f"{'--end' if end else '--begin'}: it is for one stage; give --only as well")
    if begin is not None and end:
        raise UserError("--begin and --end: give one of them")
    recipe, settings = read_recipe(recipe_file, overrides or [])
    if only is not None:
        for line in run_stage(recipe, settings, only, begin, end):
            tell(line)
        return
    graph = recipe.graph(settings)
    scope = Scope.of(graph, until, start)
    for line in plan_lines(graph, scope) if dry_run else run_recipe(recipe, settings, graph, scope):
        tell(line)
