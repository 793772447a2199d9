"""Runs a graph on this machine: skips finished stages, continues interrupted ones, and obeys stops.

After a stage fails, those that need it do not run. The others still do, since their work is kept; then the failure is
raised. A signal ends everything at once. Each stage is also locked by itself, against a job that runs it alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fusemega.errors import Retryable, UserError
from fusemega.files.lock import locked
from fusemega.files.output import write_durably
from fusemega.files.owned import drop_scratch, scratch_of
from fusemega.launch.local import launch_ranks
from fusemega.pipeline.call import write_call
from fusemega.pipeline.functions import find_function
from fusemega.pipeline.graph import Graph
from fusemega.pipeline.record import (
    Contents,
    StageRecord,
    lock_of,
    made_from,
    read_record,
    strangers,
    write_record,
    write_shape,
)
from fusemega.pipeline.scope import ALL, Scope
from fusemega.pipeline.stage import Stage, Stop
from fusemega.pipeline.verdict import StageVerdict, verdict
from fusemega.runtime.console import say
from fusemega.runtime.lifeline import child_environment

T = TypeVar("T")

_MISTAKE = 2  # the status of a command that refuses what it is given
_SIGNALLED = 128  # statuses from here on: a signal ended the command, or it ended by one


@dataclass
class Outcome:
    """What became of the stages of a graph.

    Attributes:
        results: finished stage -> what its function returned; None for a command.
        stopped: stage that stopped its branch -> reason.
        failed: stage -> message.
        not_run: stage -> the stage that stopped or failed before it.
        left: stages that were not asked for.
    """

    results: dict[str, Any] = field(default_factory=dict)
    stopped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every stage is finished."""
        return not self.not_run and not self.stopped and not self.left

    def why_not_needed(self, name: str) -> str | None:
        """The reason of the stop because of which the stage stopped or was not run; None: a failure is the cause."""
        while name in self.not_run:
            name = self.not_run[name]
        return self.stopped.get(name)


class Interrupted(Retryable):
    """A signal ended a stage's command, and with it the graph's run."""


class Crashed(Retryable):
    """A stage's command failed, and not by a mistake that its user can correct."""


def run_then(graph: Graph, finish: Callable[[Outcome], T], scope: Scope = ALL) -> T:
    """Runs the graph (or part of it), then `finish`, before another process may work in the folder. Raises as `run`."""
    with locked(graph.folder):  # `run` takes the same lock inside, which one process may
        return finish(run(graph, scope))


def run(graph: Graph, scope: Scope = ALL) -> Outcome:
    """Runs each stage that is not finished, with a line before and after it. One run at a time in a folder.

    Args:
        graph: the whole graph.
        scope: what is asked of it. Stages that are to run again are noted first: after an interruption, the next run
            goes on with them, whatever it is asked.

    Raises:
        UserError: a stage failed (its message, and what was not run for it), or another process works in the folder.
    """
    outcome, contents = Outcome(), Contents(graph)
    with locked(graph.folder):
        refuse_strangers(graph, graph.stages)
        graph.folder.mkdir(parents=True, exist_ok=True)
        write_shape(graph)
        for stage in graph.stages:
            if stage.name in scope.again and (record := read_record(graph, stage)) is not None:
                write_record(graph, stage, replace(record, state="again"))
        everything = ""
        for stage in graph.stages:
            if scope.leaves(stage.name):
                outcome.left.append(stage.name)
                continue
            ended = {**outcome.failed, **outcome.stopped, **outcome.not_run}
            cause = next((name for name in graph.needs[stage.name] if name in ended), everything)
            if cause:
                outcome.not_run[stage.name] = cause
                why = outcome.why_not_needed(cause)
                say(f"[{stage.name}] not run: it needs {cause}" if why is None else f"[{stage.name}] not needed: {why}")
                continue
            try:
                outcome.results[stage.name] = result_of(graph, stage, contents)
            except Stop as stop:
                outcome.stopped[stage.name] = stop.reason
                everything = stage.name if stop.everything else ""
            except Interrupted:  # a UserError too, but it ends the whole run
                raise
            except UserError as error:
                outcome.failed[stage.name] = str(error)
                say(f"[{stage.name}] failed: {error}")
    if outcome.failed:
        message = next(iter(outcome.failed.values()))
        others = list(outcome.failed)[1:]
        also = f"; also failed: {', '.join(others)}" if others else ""
        left = f"; not run: {', '.join(outcome.not_run)}" if outcome.not_run else ""
        raise UserError(message + also + left)
    return outcome


def result_of(graph: Graph, stage: Stage, contents: Contents) -> Any:
    """The result of the stage, which is run if necessary, under its own lock. What it needs is finished.

    Raises:
        Stop: the stage stopped, now or in an earlier run.
        Interrupted: a signal ended its command.
        Crashed: its command failed in another way than by a mistake of the user.
        UserError: it failed, or another process runs it.
    """
    with locked(lock_of(graph, stage)):
        if (record := begun(graph, stage, contents)).state == "finished":
            return record.result
        return _worked(graph, stage, contents, record)


def begun(graph: Graph, stage: Stage, contents: Contents) -> StageRecord:
    """The record of a stage that has begun just now, or that is finished. Removes what an earlier run left, if need be.

    Raises:
        Stop: the stage stopped in an earlier run.
        UserError: a record or an input cannot be read.
    """
    found = verdict(graph, stage, contents)
    if found.action == "stop":
        assert found.record is not None
        say(f"[{stage.name}] stopped before: {found.reason}")
        raise Stop(found.reason, found.record.everything)
    if found.action == "skip":
        assert found.record is not None
        say(f"[{stage.name}] finished before, skipped")
        return found.record if found.record.state == "finished" else ended(graph, stage, contents, found.record)
    inputs = {name: contents.of(path) for name, path in stage.inputs.items()}
    owns = [os.path.relpath(path, graph.folder) for path in stage.owned()]
    record = StageRecord("begun", made_from(stage), inputs, owns)
    _begin(graph, stage, found)  # before the record: after an interruption in between, it is done again
    write_record(graph, stage, record)
    say(f"[{stage.name}]" if found.reason == "new" else f"[{stage.name}] {found.reason}")
    return record


def ended(graph: Graph, stage: Stage, contents: Contents, record: StageRecord, result: Any = None) -> StageRecord:
    """Writes down that the stage is finished; returns its new record.

    Args:
        graph: its graph.
        stage: the stage.
        contents: hashes of the files.
        record: from `begun`.
        result: of its function.

    Raises:
        UserError: an output is missing.
    """
    contents.forget()
    for name, path in stage.outputs.items():
        if not os.path.exists(path):
            raise UserError(f"stage {stage.name}: ended without its output {name}: {path}")
    outputs = {name: contents.of(path) for name, path in stage.outputs.items()}
    record = replace(record, state="finished", reason="", outputs=outputs, result=result)
    write_record(graph, stage, record)
    return record


def _worked(graph: Graph, stage: Stage, contents: Contents, record: StageRecord) -> Any:
    started = time.monotonic()
    try:
        result = _work(graph, stage)
        ended(graph, stage, contents, record, result)
    except Stop as stop:
        say(f"[{stage.name}] stopped: {stop.reason}")
        write_record(graph, stage, replace(record, state="stopped", reason=stop.reason, everything=stop.everything))
        raise
    except Interrupted:  # the record stays "begun", so the next run knows that the stage was interrupted
        raise
    except UserError as error:
        write_record(graph, stage, replace(record, state="failed", reason=str(error)))
        raise
    say(f"[{stage.name}] done in {time.monotonic() - started:.0f} s")
    return result


def refuse_strangers(graph: Graph, stages: Iterable[Stage]) -> None:
    """Refuses stages with an output path where something exists that they did not make. Called before any write.

    Raises:
        UserError: there is one; or a record cannot be read.
    """
    for stage in stages:
        for path in strangers(graph, stage):
            what = f"exists, and stage {stage.name} did not make it"
            raise UserError(f"{os.path.relpath(path)}: {what}; choose another output folder")


def _begin(graph: Graph, stage: Stage, found: StageVerdict) -> None:
    """Removes what an earlier run left if this one cannot continue it; writes the run file."""
    if found.record is not None and found.anew:
        for path in stage.owned():
            with locked(path):  # the stage's command may run by hand
                drop_scratch(scratch_of(path))
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
    for path in stage.owned():
        path.parent.mkdir(parents=True, exist_ok=True)
    if stage.run_file and stage.argv:
        write_run_file(graph.folder, stage)
    if stage.function:
        graph.records.mkdir(parents=True, exist_ok=True)
        write_call(stage, graph.folder)


def write_run_file(folder: Path, stage: Stage) -> None:
    """The stage's settings as a run file, which anyone may run again by hand: its first line says how."""
    path = Path(stage.run_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, f"# {stage.command(folder)}\n{yaml.safe_dump(stage.settings, sort_keys=False)}")


def _work(graph: Graph, stage: Stage) -> Any:
    """Runs the stage's function or command to its end; returns the function's result.

    Raises:
        Stop: the function raised it.
        UserError: it failed.
    """
    if stage.function:
        return find_function(stage.function)(**stage.settings)
    if stage.launched:
        status = launch_ranks(stage.argv, stage.resources.processes)
    else:
        say(stage.command(graph.folder))
        argv = [sys.executable, "-m", "fusemega", *stage.argv]
        # As a shell reports it: 128 + N for signal N.
        status = abs(code) + 128 if (code := subprocess.run(argv, env=child_environment()).returncode) < 0 else code
    if status:
        message = f"{stage.command(graph.folder)}: ended with status {status}; its messages are above"
        kind = Interrupted if status >= _SIGNALLED else UserError if status == _MISTAKE else Crashed
        raise kind(message)
    return None
