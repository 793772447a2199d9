"""The record of a stage: what it was made from, its results, and what has changed since.

A stage's identity is its words and settings, in which paths of inputs and outputs are replaced by their names, and the
content of each input. So an output folder that moves, or an input that is only touched, changes nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from fusemega.errors import UserError
from fusemega.files.json_files import read_json
from fusemega.files.output import write_durably
from fusemega.files.remembered import content_hash
from fusemega.pipeline.graph import Graph
from fusemega.pipeline.stage import Stage

_FORMAT, _SHAPE_FORMAT = "fusemega-stage-1", "fusemega-graph-1"
_KINDS: dict[str, type] = {
    "format": str,
    "state": str,
    "made_from": dict,
    "inputs": dict,
    "owns": list,
    "outputs": dict,
}
_KINDS |= {"reason": str, "everything": bool}

State = Literal["begun", "failed", "stopped", "finished", "again"]


@dataclass(frozen=True)
class StageRecord:
    """The file `stages/NAME.json`.

    Attributes:
        state: begun (it runs, or was interrupted), failed, stopped (by its own decision), finished, or again
            (it is to be made once more, as `--from` asked).
        made_from: see `made_from`.
        inputs: name -> content hash.
        owns: paths that the stage makes or made, relative to the graph's folder; these may be removed.
        outputs: name -> content hash, when finished.
        result: what a function returned.
        reason: the reason of a failure or a stop.
        everything: whether a stop ends the whole graph.
    """

    state: State
    made_from: dict[str, Any]
    inputs: dict[str, str]
    owns: list[str]
    outputs: dict[str, str] = field(default_factory=dict)
    result: Any = None
    reason: str = ""
    everything: bool = False


def record_file(graph: Graph, stage: Stage) -> Path:
    """Where the stage's record is."""
    return graph.records / f"{stage.name}.json"


def read_record(graph: Graph, stage: Stage) -> StageRecord | None:
    """The stage's record; None if the stage never began.

    Raises:
        UserError: the file is no record, or one of another version of fusemega.
    """
    return record_at(record_file(graph, stage))


def record_at(path: Path) -> StageRecord | None:
    """The record in a file; None if there is none. Raises as `read_record`."""
    if not path.exists():
        if path.with_suffix(".begun").exists():  # written by another version of fusemega
            raise _of_another_version(path.with_suffix(".begun"))
        return None
    said = read_json(path, finite=False)
    kinds = {key: type(value) for key, value in said.items() if key != "result"}
    if kinds != _KINDS or said.pop("format") != _FORMAT or said["state"] not in get_args(State):
        raise _of_another_version(path)
    return StageRecord(**said)


def write_record(graph: Graph, stage: Stage, record: StageRecord) -> None:
    """Replaces the stage's record atomically."""
    graph.records.mkdir(parents=True, exist_ok=True)
    write_durably(record_file(graph, stage), json.dumps({"format": _FORMAT, **asdict(record)}, indent=1) + "\n")


def lock_of(graph: Graph, stage: Stage) -> Path:
    """What a process locks to run the stage."""
    return graph.records / stage.name


def write_shape(graph: Graph) -> None:
    """Writes down which stages there are and who needs whom, for those who look at the folder without the recipe."""
    graph.records.mkdir(parents=True, exist_ok=True)
    write_durably(shape_file(graph.folder), shape_text(graph))


def shape_text(graph: Graph) -> str:
    """The content of `shape_file`."""
    return json.dumps({"format": _SHAPE_FORMAT, "needs": graph.needs_in_order()}) + "\n"


def shape_file(folder: Path) -> Path:
    """The file of `write_shape`. No stage's name begins with a dot."""
    return folder / "stages" / ".graph.json"


def read_shape(folder: Path) -> dict[str, list[str]]:
    """Stage -> stages that it needs, in the graph's order; empty where nothing is written down.

    Raises:
        UserError: the file is something else.
    """
    path = shape_file(folder)
    if not path.exists():
        return {}
    said = read_json(path)
    needs = said.get("needs")
    if said.get("format") != _SHAPE_FORMAT or not isinstance(needs, dict):
        raise UserError(f"{path}: not a list of stages of this version of fusemega")
    return {str(name): [str(one) for one in of] for name, of in needs.items() if isinstance(of, list)}


def strangers(graph: Graph, stage: Stage) -> list[Path]:
    """Paths of the stage's outputs where something exists that the stage has not made."""
    record = read_record(graph, stage)
    known = set() if record is None else set(record.owns)
    return [
        path for path in stage.owned() if os.path.lexists(path) and os.path.relpath(path, graph.folder) not in known
    ]


def made_from(stage: Stage) -> dict[str, Any]:
    """The stage's words and settings as JSON, with `[kind, name, rest of the path]` in place of its paths."""
    known = [(path, "input", name) for name, path in stage.inputs.items()]
    known += [(path, "output", name) for name, path in stage.outputs.items()]
    known += [(path, "owned", str(number)) for number, path in enumerate(stage.owns)]
    known += [(stage.run_file, "run file", "")] if stage.run_file else []
    known.sort(key=lambda one: -len(one[0]))  # the innermost path names a file best

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: named(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [named(inner) for inner in value]
        if isinstance(value, str):
            for path, kind, name in known:
                if value == path or value.startswith(path + "/"):
                    return [kind, name, value[len(path) :]]
        return value

    whole = {"argv": named(stage.argv), "function": stage.function, "settings": named(stage.settings)}
    return dict(json.loads(json.dumps(whole)))  # tuples become lists, as in a record that is read


class Contents:
    """Content hashes, each taken once as long as nothing is made.

    Args:
        graph: its folder also remembers hashes of files that are not touched.
    """

    def __init__(self, graph: Graph) -> None:
        self._memory = graph.records / "hashes"
        self._known: dict[str, str] = {}

    def of(self, path: str) -> str:
        """The content hash of a file or folder.

        Raises:
            UserError: it is not there, or is neither a regular file nor a folder.
        """
        if path not in self._known:
            self._known[path] = content_hash(Path(path), self._memory)
        return self._known[path]

    def forget(self) -> None:
        """Drops the hashes, because something was made or removed."""
        self._known.clear()


def changes(stage: Stage, record: StageRecord, contents: Contents, to_come: set[str]) -> Iterator[str]:
    """The differences between what the stage is made from now and what the record says, each in a few words.

    Args:
        stage: as it is now.
        record: the record of an earlier run.
        contents: hashes of the files.
        to_come: names of inputs whose content is not known yet.
    """
    now = made_from(stage)
    for part in ("argv", "function"):
        if record.made_from.get(part) != now[part]:
            yield "its command changed"
            break
    if place := difference(record.made_from.get("settings"), now["settings"]):
        yield f"its setting {place} changed"
    if record.inputs.keys() != stage.inputs.keys():
        yield f"its inputs are {', '.join(stage.inputs)}, and were {', '.join(record.inputs)}"
        return
    for name, path in stage.inputs.items():
        if name not in to_come and record.inputs[name] != contents.of(path):
            yield f"its input {name} changed"


def damage(stage: Stage, record: StageRecord, contents: Contents) -> str | None:
    """Which output of a finished stage is not as the stage made it; None if all are.

    An output without a recorded hash is one that an earlier version of the stage did not make.
    """
    for name, path in stage.outputs.items():
        if not os.path.exists(path):
            return f"its output {name} is missing"
        if record.outputs.get(name) != contents.of(path):
            return f"its output {name} is damaged: {path} is not as the stage made it"
    return None


def difference(before: Any, now: Any, at: str = "") -> str:
    """The key path of the first difference between two JSON values; "" where there is none.

    >>> difference({"teach": {"top_k": 10}}, {"teach": {"top_k": 20}})
    'teach.top_k'
    """
    if type(before) is type(now) and isinstance(now, dict):
        for key in [*now, *(key for key in before if key not in now)]:
            inner = f"{at}.{key}" if at else str(key)
            if (key in before) != (key in now):
                return inner
            if found := difference(before[key], now[key], inner):
                return found
        return ""
    if type(before) is type(now) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now, strict=True))
        return next(filter(None, (difference(b, n, f"{at}.{i}") for i, (b, n) in pairs)), "")
    return "" if type(before) is type(now) and before == now else at or "(all)"


def _of_another_version(path: Path) -> UserError:
    return UserError(f"{path}: not a record of this version of fusemega; choose another output folder")
