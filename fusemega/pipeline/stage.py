"""A stage of a recipe: plain data that can be printed, run here, or handed to a batch system."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LAUNCHED = ("train", "teach", "eval", "score", "prune search")
"""Commands that run as several ranks, and take --nproc."""


class Stop(Exception):  # noqa: N818  (no error: a decision)
    """Raised by a stage's function that ends the work for a reason, such as a model that is no better than before.

    Args:
        reason: one sentence, which is written down and shown.
        everything: no further stage runs; otherwise only those that need this one do not.
    """

    def __init__(self, reason: str, everything: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.everything = reason, everything


@dataclass(frozen=True)
class Resources:
    """What a stage needs of the machine.

    Attributes:
        processes: ranks of a command in `LAUNCHED`; the others run in one process.
    """

    processes: int = 1


@dataclass(frozen=True)
class Stage:
    """One step. It has either `argv` or `function`.

    Attributes:
        name: unique in its graph; also names files.
        argv: the words after `fusemega`.
        function: `module:name` of a function under `@stage_function`; called in this process with `settings` as its
            keyword arguments. What it returns is JSON-able, and kept in the stage's record.
        settings: what the run file holds, or the function's arguments. JSON-able.
        run_file: where a command's `settings` are written as YAML, for `argv` to name; "": it has none. A function
            that takes a path to write a run file to names it here as well.
        inputs: name -> path of a file or folder that the stage reads: one that another stage makes, or one from outside
            the graph. Where the same path stands in `argv` or `settings` (or a path inside it), it counts by content.
        outputs: name -> path of a file or folder that proves the stage's work: its content is written down, and when
            it is missing or different the stage runs again.
        owns: further paths that the stage makes, such as the run folder whose `hf` is the output. They are removed
            with the outputs before the stage begins anew; changes in them do not make the stage run again.
        resumes: whether the command continues from what an interrupted run left. Otherwise that is removed first.
        whole: whether the outputs appear finished or not at all, and the command refuses those that are there. Found
            after an interruption, they are the stage's, which was interrupted before that was written down.
        keeps: whether the command uses what fits of an earlier run's output even where settings or inputs have changed,
            as a sampler goes on with the responses that it has. Then only `--from` removes that first.
        resources: what it needs of the machine.
        may_be_array: stages of one command that do not need each other may become one job array.

    >>> align = Stage("align-qwen", ("align", "models/qwen", "models/llama", "out/qwen.map"),
    ...     inputs={"source": "models/qwen", "target": "models/llama"}, outputs={"map": "out/qwen.map"})
    >>> align.command(Path("out"))
    'fusemega align models/qwen models/llama out/qwen.map'
    """

    name: str
    argv: tuple[str, ...] = ()
    function: str = ""
    settings: Any = field(default_factory=dict)
    run_file: str = ""
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)
    owns: tuple[str, ...] = ()
    resumes: bool = False
    whole: bool = False
    keeps: bool = False
    resources: Resources = Resources()
    may_be_array: bool = False

    @property
    def launched(self) -> bool:
        """Whether it is a command in `LAUNCHED`."""
        return " ".join(self.argv).startswith(tuple(f"{command} " for command in LAUNCHED))

    def owned(self) -> list[Path]:
        """Absolute paths of all that the stage makes; none is inside another."""
        paths = {Path(os.path.abspath(path)) for path in (*self.outputs.values(), *self.owns)}
        return sorted(path for path in paths if not paths.intersection(path.parents))

    def words(self) -> list[str]:
        """`argv` with the number of processes."""
        several = self.launched and self.resources.processes > 1
        return [*self.argv, *(["--nproc", str(self.resources.processes)] if several else [])]

    def command(self, folder: Path) -> str:
        """The shell command that does the same by hand, once the graph's `folder` has the stage's run file."""
        if self.function:
            return shlex.join(["python", "-m", "fusemega.pipeline.call", str(self.call_file(folder))])
        return shlex.join(["fusemega", *self.words()])

    def call_file(self, folder: Path) -> Path:
        """The file that `fusemega.pipeline.call` reads, for a stage with a function."""
        return folder / "stages" / f"{self.name}.yaml"
