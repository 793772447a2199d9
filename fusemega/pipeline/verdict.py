"""Which stages of a graph would run now, and why. Reads records and contents, and changes nothing."""

from __future__ import annotations

import os
from collections.abc import Set
from dataclasses import dataclass
from typing import Literal

from fusemega.pipeline.graph import Graph
from fusemega.pipeline.record import Contents, StageRecord, changes, damage, read_record
from fusemega.pipeline.scope import ALL, Scope
from fusemega.pipeline.stage import Stage

AGAIN = "again, as --from asks"


@dataclass(frozen=True)
class StageVerdict:
    """What is to be done with a stage.

    Attributes:
        action: run: it runs. skip: it is finished. stop: it stopped in an earlier run, from the same inputs.
            wait: it is not needed, because a stage stopped that it needs; `reason` is that stage's. leave: it is not in
            the part that is asked for.
        reason: in a few words.
        anew: for `run`: whether what an earlier run left is removed first, because it cannot be continued.
        record: the record of the earlier run.
    """

    action: Literal["run", "skip", "stop", "wait", "leave"]
    reason: str
    anew: bool = True
    record: StageRecord | None = None


def verdict(graph: Graph, stage: Stage, contents: Contents, running: Set[str] = frozenset()) -> StageVerdict:
    """The verdict on one stage.

    Args:
        graph: the graph of the stage.
        stage: all stages that it needs are finished, or in `running`.
        contents: hashes of the files.
        running: names of the stages that would run before; what they make is not known.

    Raises:
        UserError: a record or an input that cannot be read.
    """
    record = read_record(graph, stage)
    makers = {name: graph.maker(path) for name, path in stage.inputs.items()}
    to_come = {name for name, maker in makers.items() if maker in running}
    if record is None:
        return StageVerdict("run", "new")
    if record.state == "again":
        return StageVerdict("run", AGAIN, record=record)
    if reasons := list(changes(stage, record, contents, to_come)):
        return StageVerdict("run", "; ".join(reasons), not stage.keeps, record)
    if to_come:
        names = ", ".join(dict.fromkeys(f"{name} (of {makers[name]})" for name in stage.inputs if name in to_come))
        return StageVerdict("run", f"its input {names} may change", anew=False, record=record)
    if record.state == "stopped":
        return StageVerdict("stop", record.reason, record=record)
    if record.state in ("begun", "failed") and stage.whole and all(map(os.path.exists, stage.outputs.values())):
        return StageVerdict("skip", "finished when it was interrupted", record=record)
    if record.state == "failed":
        return StageVerdict("run", f"failed before: {record.reason}", not stage.resumes, record)
    if record.state == "begun":
        return StageVerdict("run", "was interrupted", not stage.resumes, record)
    if broken := damage(stage, record, contents):
        return StageVerdict("run", broken, not stage.keeps, record)
    return StageVerdict("skip", "finished", record=record)


def plan(graph: Graph, scope: Scope = ALL) -> dict[str, StageVerdict]:
    """Name -> verdict of every stage, in the graph's order.

    Args:
        graph: the whole graph.
        scope: what is asked of it.

    Raises:
        UserError: see `verdict`.
    """
    contents, found = Contents(graph), {}
    running: set[str] = set()
    ended: dict[str, str] = {}  # stage that stopped, or is not needed for that -> the reason
    everything: str | None = None
    for stage in graph.stages:
        why = next((ended[name] for name in graph.needs[stage.name] if name in ended), everything)
        if scope.leaves(stage.name):
            found[stage.name] = StageVerdict("leave", "--until ends before it")
        elif why is not None:
            found[stage.name] = StageVerdict("wait", why)
        elif stage.name in scope.again:
            record = read_record(graph, stage)
            found[stage.name] = StageVerdict("run", "new" if record is None else AGAIN, record=record)
        else:
            found[stage.name] = verdict(graph, stage, contents, running)
        one = found[stage.name]
        if one.action == "run":
            running.add(stage.name)
        elif one.action in ("stop", "wait"):
            ended[stage.name] = one.reason
        if one.action == "stop" and one.record is not None and one.record.everything:
            everything = one.reason
    return found


def plan_lines(graph: Graph, scope: Scope = ALL) -> list[str]:
    """The plan for a terminal: a line a stage; of each that would run, also what it needs and its command."""
    words = {"run": "run", "skip": "skip", "stop": "stopped", "wait": "not needed", "leave": "left out"}
    lines, found = [], plan(graph, scope)
    width = max((len(name) for name in found), default=0)
    for stage in graph.stages:
        one = found[stage.name]
        lines.append(f"{stage.name:<{width}}  {words[one.action]}: {one.reason}")
        if one.action == "run":
            if needs := graph.needs[stage.name]:
                lines.append(f"{'':<{width}}  after {', '.join(needs)}")
            lines.append(f"{'':<{width}}  $ {stage.command(graph.folder)}")
    return lines
