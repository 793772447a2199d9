"""One stage of a graph by itself, as a batch job runs it: other jobs run other stages of the same folder meanwhile.

`run` locks the folder, since it works on all of it. Here only the stage is locked, and what it needs must have ended.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from fusemega.checkpoint.series import CHECKPOINTS, TRACKER
from fusemega.errors import UserError
from fusemega.files.lock import locked
from fusemega.files.owned import scratch_of
from fusemega.pipeline.graph import Graph
from fusemega.pipeline.record import Contents, lock_of, read_record, write_shape
from fusemega.pipeline.run import Outcome, begun, ended, refuse_strangers, result_of
from fusemega.pipeline.scope import Scope
from fusemega.pipeline.stage import Stage, Stop
from fusemega.pipeline.verdict import plan
from fusemega.runtime.console import say


@dataclass(frozen=True)
class Alone:
    """What became of the stage.

    Attributes:
        state: begun, finished, stopped (by its own decision) or not needed (a stage before it stopped).
        reason: in a sentence; "" if it is begun or finished.
    """

    state: str
    reason: str = ""


def run_alone(graph: Graph, name: str) -> Alone:
    """Runs one stage, if it has to run. Stages that it needs must have ended; no other is run.

    Args:
        graph: the whole graph.
        name: the stage.

    Raises:
        Interrupted, Crashed: its command was ended by a signal, or failed; not by a mistake of the user.
        UserError: no such stage; a stage that it needs is not finished; it failed; another process runs it.
    """
    return _alone(graph, name, lambda stage: result_of(graph, stage, Contents(graph)))


def begin_alone(graph: Graph, name: str) -> Alone:
    """Begins one stage whose command the caller then starts, as ranks on several nodes; `end_alone` follows.

    It is written down that the stage has begun, what cannot be continued is removed, and its run file is written. Begun
    again after an interruption, it goes on. Arguments and errors as `run_alone`.
    """

    def begin(stage: Stage) -> Any:
        with locked(lock_of(graph, stage)):
            return begun(graph, stage, Contents(graph))

    return _alone(graph, name, begin)


def end_alone(graph: Graph, name: str) -> None:
    """Writes down that a stage is finished, whose command has ended with status 0.

    Raises:
        UserError: an output is missing: the command stopped before its end; or it has not begun.
    """
    stage = stage_named(graph, name)
    with locked(lock_of(graph, stage)):
        record = read_record(graph, stage)
        if record is None or record.state not in ("begun", "finished"):
            raise UserError(f"stage {name}: it has not begun{'' if record is None else f': it is {record.state}'}")
        if record.state == "begun":
            ended(graph, stage, Contents(graph), record)
            say(f"[{name}] done")


def steps_for_a_script(stage: Stage) -> list[str]:
    """What slurm/stage.sbatch reads: `ranks` or `single`; how many paths follow in which durable work can be seen, and
    these; then, for `ranks`, the words after `fusemega`. One a line."""
    if stage.argv[:1] == ("train",):
        seen = [str(place / CHECKPOINTS / TRACKER) for place in stage.owned()]
    else:
        seen = [str(path) for place in stage.owned() for path in (place, scratch_of(place))]
    return ["ranks" if stage.launched else "single", str(len(seen)), *seen, *(stage.argv if stage.launched else ())]


def stage_named(graph: Graph, name: str) -> Stage:
    """The stage of exactly this name.

    Raises:
        UserError: there is none.
    """
    found = graph.named("--only", name)
    if found != [name]:
        raise UserError(f"--only {name}: it begins the names of several stages; allowed: {', '.join(found)}")
    return next(stage for stage in graph.stages if stage.name == name)


def finish_last(graph: Graph, finish: Callable[[Outcome], Any]) -> Any:
    """Calls `finish` if every stage has ended: it is finished, has stopped, or is not needed behind a stop.

    Of several jobs, the last one does this. Two that end in the same moment may both come here; the one that finds the
    folder locked leaves it to the other.

    Returns:
        What `finish` returned, or None.
    """
    outcome = _outcome(graph)
    if outcome is None:
        return None
    with ExitStack() as held:
        try:
            held.enter_context(locked(graph.folder))
        except UserError:
            return None
        return finish(outcome)


def _outcome(graph: Graph) -> Outcome | None:
    """What became of the stages, by their records; None if one has not ended."""
    outcome, everything = Outcome(), ""
    for stage in graph.stages:
        record, ended = read_record(graph, stage), {**outcome.stopped, **outcome.not_run}
        cause = next((name for name in graph.needs[stage.name] if name in ended), everything)
        if cause:
            outcome.not_run[stage.name] = cause
        elif record is not None and record.state == "finished":
            outcome.results[stage.name] = record.result
        elif record is not None and record.state == "stopped":
            outcome.stopped[stage.name] = record.reason
            everything = stage.name if record.everything else ""
        else:
            return None
    return outcome


def _alone(graph: Graph, name: str, work: Callable[[Stage], Any]) -> Alone:
    stage = stage_named(graph, name)
    refuse_strangers(graph, [stage])
    before = graph.before([name])
    found = plan(graph, Scope(until=before))
    if unfinished := [other for other in before - {name} if found[other].action == "run"]:
        first = next(other.name for other in graph.stages if other.name in unfinished)
        raise UserError(f"stage {name}: it needs {first}, which is not finished ({found[first].reason})")
    reason = found[name].reason if found[name].action == "wait" else _everything_stopped(graph, stage)
    if reason:
        say(f"[{name}] not needed: {reason}")
        return Alone("not needed", reason)
    graph.folder.mkdir(parents=True, exist_ok=True)
    write_shape(graph)
    try:
        work(stage)
    except Stop as stop:
        return Alone("stopped", stop.reason)
    record = read_record(graph, stage)
    assert record is not None
    return Alone(record.state)


def _everything_stopped(graph: Graph, stage: Stage) -> str:
    """Why a stage before this one, in the graph's order, has stopped everything; "" for none."""
    for other in graph.stages[: graph.stages.index(stage)]:
        record = read_record(graph, other)
        if record is not None and record.state == "stopped" and record.everything:
            return record.reason
    return ""
