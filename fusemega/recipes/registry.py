"""Recipes by name: what `recipe:` of a recipe file picks."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from fusemega.config import Section, read_yaml, validate
from fusemega.errors import UserError, choose
from fusemega.files.output import write_output
from fusemega.pipeline.alone import (
    Alone,
    begin_alone,
    end_alone,
    finish_last,
    run_alone,
    stage_named,
    steps_for_a_script,
)
from fusemega.pipeline.graph import Graph
from fusemega.pipeline.run import Outcome, run_then
from fusemega.pipeline.scope import ALL, Scope

S = TypeVar("S", bound=Section)

DEFAULT = "fuse"
MODULES = {
    "fuse": "fusemega.recipes.fusion",
    "fusechat3": "fusemega.recipes.fusechat3",
    "wrpo": "fusemega.recipes.wrpo",
    "fuserl": "fusemega.recipes.fuserl",
    "mutual_taught": "fusemega.recipes.mutual_taught",
    "blockpruner": "fusemega.recipes.blockpruner",
}
"""Name -> module with a `Recipe` named `RECIPE`, imported when a file asks for it."""


class Recipe(ABC, Generic[S]):
    """A kind of recipe file: its settings, the graph that they describe, and the summary at the end.

    Attributes:
        Settings: the settings of the file, with the keys `recipe` and `output_dir`.
    """

    Settings: type[S]

    @abstractmethod
    def graph(self, settings: S) -> Graph:
        """The stages. Writes nothing.

        Raises:
            UserError: a model or file that is not there, stages that do not fit together.
        """

    @abstractmethod
    def finish(self, settings: S, outcome: Outcome) -> list[str]:
        """Writes a summary of the finished graph into the output folder. Returns lines for the terminal."""

    def stopped(self, settings: S, outcome: Outcome) -> list[str]:
        """Likewise, of a graph in which a stage has stopped by its own decision. Returns further lines."""
        return []


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Recipe[Any], Any]:
    """A recipe and its settings from a file; `recipe` is `fuse` where the file leaves it out.

    Raises:
        UserError: the file is malformed, its kind is unknown, or a setting is wrong.
    """
    values = read_yaml(path, overrides)
    name = values.get("recipe", DEFAULT)
    if not isinstance(name, str):
        raise UserError(f"{path}: recipe: found {name!r}; allowed: {', '.join(MODULES)}")
    recipe: Recipe[Any] = importlib.import_module(MODULES[choose(f"{path}: recipe", name, MODULES)]).RECIPE
    return recipe, validate(recipe.Settings, values, path)


def run_recipe(recipe: Recipe[Any], settings: Any, graph: Graph | None = None, scope: Scope = ALL) -> list[str]:
    """Runs every stage that is not finished; returns lines for the terminal.

    Args:
        recipe: the kind of recipe.
        settings: of its file.
        graph: its graph, if it was made already.
        scope: what is asked of it.

    Raises:
        UserError: a stage failed.
    """

    def finish(outcome: Outcome) -> list[str]:
        if outcome.complete:
            return recipe.finish(settings, outcome)
        lines = [f"{name} stopped: {reason}" for name, reason in outcome.stopped.items()]
        if lines:
            lines.append(f"not run: {', '.join(outcome.not_run) or 'nothing'}")
            lines += recipe.stopped(settings, outcome)
        if outcome.left:
            lines.append(f"left out, as --until asks: {', '.join(outcome.left)}")
        return lines

    return run_then(recipe.graph(settings) if graph is None else graph, finish, scope)


def run_stage(recipe: Recipe[Any], settings: Any, name: str, begin: Path | None = None, end: bool = False) -> list[str]:
    """Runs one stage of a recipe, as a batch job does; returns lines for the terminal.

    The job that ends last writes the recipe's summary, as `run_recipe` does at its end.

    Args:
        recipe: the kind of recipe.
        settings: of its file.
        name: the stage.
        begin: only begin it, and write there what a job script has to do then (`steps_for_a_script`).
        end: only write down that it is finished.

    Raises:
        UserError: as `run_alone`, `begin_alone` and `end_alone`.
    """
    graph = recipe.graph(settings)
    if begin is not None:
        stage = stage_named(graph, name)
        done = begin_alone(graph, name) if stage.launched else Alone("begun")
        write_output(begin, "".join(f"{line}\n" for line in steps_for_a_script(stage) if done.state == "begun"))
    elif end:
        end_alone(graph, name)
        done = Alone("finished")
    else:
        done = run_alone(graph, name)
    lines = [f"{name} {done.state}: {done.reason}"] if done.reason else []

    def finish(outcome: Outcome) -> list[str]:
        return recipe.finish(settings, outcome) if outcome.complete else recipe.stopped(settings, outcome)

    return lines + (finish_last(graph, finish) or [])
