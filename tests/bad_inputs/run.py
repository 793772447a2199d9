"""One malformed input: damage a copy of the base, run the command in this process, see what it said and left."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shlex
import shutil
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fusemega import cli
from tests.bad_inputs.damage import Damage

_HEARTBEAT = re.compile(r"run/monitor/rank-\d{5}\.json")
_COUNTS = re.compile(r"^[^:]+: \d+ prompts in \d+ rows|: \d+ responses to sample|^\d+ prompts with \d+ responses")


@dataclass(frozen=True)
class Bad:
    """One row of the table.

    Attributes:
        kind: what is malformed: configuration, model configuration, weights, index, tokenizer, data, store,
            checkpoint, report, responses, pruning.
        name: what is wrong with it.
        command: the words after `fusemega`, in the damaged copy of the base.
        words: what the line on stderr must contain.
        damage: done to the copy, in order.
    """

    kind: str
    name: str
    command: str
    words: str
    damage: tuple[Damage, ...] = ()


class Row(Protocol):
    """One line of a table: see `Bad` for the words of it."""

    def __call__(self, name: str, command: str, words: str, *damage: Damage) -> Bad: ...


def kind(kind: str) -> Row:
    """What makes the rows of one kind: `row("empty", "train train.yaml", "train.yaml: ", put("train.yaml", ""))`."""
    return lambda name, command, words, *damage: Bad(kind, name, command, words, damage)


def found_wrong(bad: Bad, base: Path, place: Path) -> str | None:
    """None where the command ended with status 2, one line that has the words, and nothing written; else what it did.

    Args:
        bad: the row.
        base: the folder `base.build` filled.
        place: where the copy goes; removed afterwards.
    """
    shutil.copytree(base, place)
    errors = io.StringIO()
    try:
        with standing_in(place), _environment(place.with_name("cache")):
            for damage in bad.damage:
                damage()
            before = _snapshot()
            try:
                with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        cli.main(shlex.split(bad.command))
                return "ended without an exit status"
            except SystemExit as stop:
                status = stop.code
            except BaseException:
                return traceback.format_exc()
            after = _snapshot()
    finally:
        shutil.rmtree(place)
    said = errors.getvalue()
    if status != 2:
        return f"status {status}, and on stderr: {said}"
    if bad.kind == "responses":  # what was read is counted first, a line each
        told, _, last = said.rstrip("\n").rpartition("\n")
        if not all(_COUNTS.search(line) for line in told.splitlines()):
            return f"more than counts before the error: {said}"
        said = f"{last}\n"
    if not said.startswith("error: ") or said.count("\n") != 1:
        return f"not one line: {said}"
    if bad.words not in said:
        return f"the line lacks {bad.words!r}: {said}"
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    # A rank of a run that is there says in its heartbeat how its start ended, also where it was refused.
    changed = [path for path in changed if not (path in before and _HEARTBEAT.fullmatch(path))]
    return f"changed: {', '.join(changed)}" if changed else None


def _snapshot() -> dict[str, str]:
    """Every file of the current folder with its content and time, and every folder."""
    return {
        str(path): f"{path.stat().st_mtime_ns} {hashlib.md5(path.read_bytes()).hexdigest()}" if path.is_file() else ""
        for path in Path().rglob("*")
    }


@contextlib.contextmanager
def standing_in(folder: Path) -> Iterator[None]:
    """contextlib.chdir, which Python 3.10 lacks."""
    previous = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(previous)


@contextlib.contextmanager
def _environment(cache: Path) -> Iterator[None]:
    """Tokenized data goes to `cache`: it is no output of the command."""
    previous = os.environ.get("FUSEMEGA_CACHE")
    os.environ["FUSEMEGA_CACHE"] = str(cache)
    try:
        yield
    finally:
        if previous is None:
            del os.environ["FUSEMEGA_CACHE"]
        else:
            os.environ["FUSEMEGA_CACHE"] = previous
