"""Stages joined by paths: a stage that reads a path needs the stage that makes it. Errors name what does not fit."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from fusemega.errors import UserError, nearest
from fusemega.pipeline.functions import find_function
from fusemega.pipeline.stage import Stage

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


class Graph:
    """Stages in an order in which each comes after those that it needs.

    Attributes:
        folder: the recipe's output folder. Records lie in `folder/stages`.
        stages: in the given order, except that a stage comes after all that it needs.
        needs: name -> names of the stages that make what this one reads.

    Raises:
        UserError: two stages of one name or with one output, an input that is neither there nor made by a stage, a
            circle, a function that is not known.
    """

    def __init__(self, folder: str | Path, stages: Iterable[Stage]) -> None:
        self.folder, given = Path(folder), list(stages)
        self._makers: dict[Path, str] = {}
        for stage in given:
            self._check_name(stage, [other.name for other in given])
            for path in stage.owned():
                if (other := self._makers.setdefault(path, stage.name)) != stage.name:
                    raise UserError(f"stages {other} and {stage.name} both write {path}")
        records = Path(os.path.abspath(self.records))
        for path, name in self._makers.items():
            if outer := next((above for above in path.parents if above in self._makers), None):
                raise UserError(f"stage {name} writes {path}, inside {outer}, which stage {self._makers[outer]} writes")
            if path == records or path in records.parents or records in path.parents:
                raise UserError(f"stage {name} writes {path}, where the records of stages are: {records}")
        self.needs = {stage.name: self._needs(stage) for stage in given}
        self.stages = self._ordered(given)

    @property
    def records(self) -> Path:
        """The folder of records."""
        return self.folder / "stages"

    def needs_in_order(self) -> dict[str, list[str]]:
        """`needs`, with the names in the order of `stages`."""
        return {stage.name: self.needs[stage.name] for stage in self.stages}

    def maker(self, path: str | Path) -> str | None:
        """The name of the stage that makes `path`, or a folder above it; None if no stage does."""
        whole = Path(os.path.abspath(path))
        return next((self._makers[place] for place in (whole, *whole.parents) if place in self._makers), None)

    def named(self, what: str, name: str) -> list[str]:
        """The stage of that name, or every stage whose name begins with it and a `-`: `sample` is all of `sample-...`.

        Args:
            what: where the name was given, for messages.
            name: a stage's name, or its beginning.

        Raises:
            UserError: there is none; it names the nearest.
        """
        names = [stage.name for stage in self.stages]
        found = [one for one in names if one == name] or [one for one in names if one.startswith(f"{name}-")]
        if not found:
            raise UserError(f"{what}: there is no stage {name!r}{nearest(name, names)}; allowed: {', '.join(names)}")
        return found

    def before(self, names: Iterable[str]) -> set[str]:
        """These stages and all that they need."""
        found = set(names)
        for stage in reversed(self.stages):
            if stage.name in found:
                found.update(self.needs[stage.name])
        return found

    def after(self, names: Iterable[str]) -> set[str]:
        """These stages and all that need them."""
        found = set(names)
        for stage in self.stages:
            if found.intersection(self.needs[stage.name]):
                found.add(stage.name)
        return found

    def lines(self) -> list[str]:
        """The graph as text for a terminal: each stage with what it needs, makes and runs."""
        lines = []
        for stage in self.stages:
            needs = f"  after {', '.join(self.needs[stage.name])}" if self.needs[stage.name] else ""
            array = "  (may be part of a job array)" if stage.may_be_array else ""
            lines.append(f"{stage.name}{needs}{array}")
            for word, paths in (("reads", stage.inputs), ("makes", stage.outputs)):
                lines += [f"    {word} {name}: {path}" for name, path in paths.items()]
            lines.append(f"    $ {stage.command(self.folder)}")
        return lines

    def _check_name(self, stage: Stage, names: Sequence[str]) -> None:
        if not _NAME.fullmatch(stage.name):
            raise UserError(f"stage {stage.name!r}: a name is letters, digits, and . - _")
        if names.count(stage.name) > 1:
            raise UserError(f"stage {stage.name}: there are {names.count(stage.name)} of this name")
        if bool(stage.argv) == bool(stage.function):
            raise UserError(f"stage {stage.name}: give it either a command or a function")
        if stage.function:
            find_function(stage.function)

    def _needs(self, stage: Stage) -> list[str]:
        found = []
        for name, path in stage.inputs.items():
            maker = self.maker(path)
            if maker is None and not os.path.exists(path):
                made = [str(os.path.relpath(place)) for place in self._makers]
                raise UserError(
                    f"stage {stage.name}: input {name}: {path}: no such file or folder, and no stage makes it"
                    f"{nearest(os.path.relpath(path), made)}"
                )
            if maker is not None and maker not in found:
                found.append(maker)
        return found

    def _ordered(self, given: list[Stage]) -> list[Stage]:
        ordered: list[Stage] = []
        done: set[str] = set()
        while len(ordered) < len(given):
            ready = (stage for stage in given if stage.name not in done and done.issuperset(self.needs[stage.name]))
            if (stage := next(ready, None)) is None:
                raise UserError(f"stages in a circle, each after the next: {' -> '.join(self._circle(done))}")
            ordered.append(stage)
            done.add(stage.name)
        return ordered

    def _circle(self, done: set[str]) -> list[str]:
        """One of the circles among the stages that are not `done`; its first name is its last."""
        path = [next(name for name in self.needs if name not in done)]
        while path[-1] not in path[:-1]:
            path.append(next(name for name in self.needs[path[-1]] if name not in done))
        return path[path.index(path[-1]) :]
