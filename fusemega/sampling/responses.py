"""A responses file: JSONL that only grows, a line for each response of one source.

NAME                   {"key", "prompt", "source", "sample", "text", "finish_reason", "prompt_tokens", "tokens",
                       "settings"}; of a refused prompt also "reason"
NAME.settings.json     what the responses were made with; `settings`, a hash of it, is in every line

A response is known by its prompt's key and its number. Half a line that a killed process left is cut off.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fusemega.errors import UserError
from fusemega.files.json_files import MalformedError, parse_json, read_json
from fusemega.files.lock import locked
from fusemega.files.opening import MIB, open_regular
from fusemega.files.output import check_output_file, disk_errors, write_durably
from fusemega.runtime.console import say
from fusemega.sampling.engine import Response
from fusemega.sampling.prompts import Prompt

_LINE_BYTES = 64 * MIB
_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "key": str,
    "prompt": list,
    "source": str,
    "sample": int,
    "text": str,
    "finish_reason": str,
    "prompt_tokens": (int, type(None)),
    "tokens": (int, type(None)),
    "settings": str,
}


@dataclass(frozen=True)
class Made:
    """What responses were made with.

    Attributes:
        source: name of the source.
        engine: `Engine.identity`.
        sampling: the sampling settings without `n`.
        n: responses wanted to each prompt; it may change from run to run.
    """

    source: str
    engine: Mapping[str, Any]
    sampling: Mapping[str, Any]
    n: int

    @property
    def settings(self) -> str:
        """32 hex digits of everything that decides the responses to a prompt."""
        text = json.dumps([self.source, self.engine, self.sampling], sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def differences(self, other: Made) -> list[str]:
        """Which keys differ, with both values."""
        found = []
        for name in ("source", "engine", "sampling"):
            here, there = _flat(getattr(self, name), name), _flat(getattr(other, name), name)
            for key in {**here, **there}:
                if here.get(key) != there.get(key):
                    found.append(f"{key}: {_short(here.get(key))} there, {_short(there.get(key))} now")
        return found


def settings_file(path: Path) -> Path:
    """The side file of a responses file."""
    return path.with_name(f"{path.name}.settings.json")


def read_made(path: Path) -> Made:
    """What the responses in `path` were made with.

    Raises:
        UserError: no side file, or a damaged one.
    """
    side = settings_file(path)
    if not side.is_file():
        raise UserError(f"{path}: not a responses file of `fusemega sample`: {side.name} is not beside it")
    said = read_json(side)
    try:
        made = Made(said["source"], said["engine"], said["sampling"], said["n"])
        whole = said["settings"] == made.settings and type(made.n) is int
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"{side}: damaged: its contents are not those of its hash")
    return made


def read_responses(path: Path, made: Made) -> Iterator[Mapping[str, Any]]:
    """The lines of a responses file; half a line at the end is left out.

    Raises:
        UserError: a line that is no response (its number), one made with other settings, or a response twice.
    """
    seen: dict[tuple[str, int], int] = {}
    with open_regular(path, "the responses") as file:
        for number, line in _whole_lines(path, file):
            try:
                row = parse_json(line)
            except MalformedError as error:
                raise UserError(f"{path}:{number}: {error}") from None
            for name, kind in _TYPES.items():
                if not isinstance(row, dict) or name not in row or not isinstance(row[name], kind):
                    raise UserError(f"{path}:{number}: not a response: {name} is missing or of another type")
            if row["settings"] != made.settings:
                raise UserError(
                    f"{path}:{number}: a response made with other settings than {settings_file(path).name} says"
                )
            known = seen.setdefault((row["key"], row["sample"]), number)
            if known != number:
                raise UserError(f"{path}:{number}: the response {row['sample']} of line {known} again")
            yield row


class ResponsesFile:
    """A responses file that is being written.

    Attributes:
        known: (key, sample) -> finish_reason of the responses that are there.
    """

    def __init__(self, made: Made, known: dict[tuple[str, int], str], file: IO[bytes]) -> None:
        self.known = known
        self._made, self._file = made, file

    def add(self, prompt: Prompt, response: Response) -> None:
        """Appends a response. A process that is killed later does not lose it."""
        row = {
            "key": response.key,
            "prompt": list(prompt.messages),
            "source": self._made.source,
            "sample": response.sample,
            "text": response.text,
            "finish_reason": response.finish_reason,
            "prompt_tokens": response.prompt_tokens,
            "tokens": response.tokens,
            "settings": self._made.settings,
            **({"reason": response.reason} if response.reason else {}),
        }
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self.known[response.key, response.sample] = response.finish_reason


def check_responses(path: Path, made: Made) -> dict[tuple[str, int], str]:
    """What is known already, before anything is written: (key, sample) -> finish_reason.

    Raises:
        UserError: the place cannot be written; another file is there; responses made with other settings.
    """
    check_output_file(path)
    side = settings_file(path)
    if not side.exists():
        if path.exists() and path.stat().st_size:
            raise UserError(f"{path}: exists and was not written by `fusemega sample`; nothing is overwritten")
        return {}
    begun = read_made(path)
    if differences := begun.differences(made):
        raise UserError(
            f"{path}: was begun with other settings ({'; '.join(differences)}); take them back, or choose another "
            "output"
        )
    if not path.exists():
        return {}
    return {(row["key"], row["sample"]): row["finish_reason"] for row in read_responses(path, made)}


@contextmanager
def open_responses(path: Path, made: Made, known: Mapping[tuple[str, int], str]) -> Iterator[ResponsesFile]:
    """The file, to be added to.

    Args:
        path: of the file, for which the caller holds the lock.
        made: what the new responses are made with.
        known: what `check_responses` found since the lock is held.

    Raises:
        UserError: the disk is full, or the place cannot be written.
    """
    with locked(path), disk_errors(path):
        said = {"source": made.source, "engine": made.engine, "sampling": made.sampling, "n": made.n}
        write_durably(settings_file(path), json.dumps({**said, "settings": made.settings}, indent=1) + "\n")
        _heal(path)
        with open(path, "ab") as file:
            try:
                yield ResponsesFile(made, dict(known), file)
            finally:
                file.flush()
                os.fsync(file.fileno())


def _heal(path: Path) -> None:
    """Cuts off half a line at the end."""
    if not path.exists():
        return
    with open(path, "r+b") as file:
        end = size = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - (1 << 16))
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            file.truncate(end)
            say(f"{path}: {size - end} bytes of a response that was not written to its end are removed")


def _whole_lines(path: Path, file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := file.readline(_LINE_BYTES + 1):
        number += 1
        if len(line) > _LINE_BYTES:
            raise UserError(f"{path}:{number}: a line of more than {_LINE_BYTES} bytes")
        if line.endswith(b"\n"):
            yield number, line


def _flat(value: Any, at: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {at: value}
    return {name: inner for key, item in value.items() for name, inner in _flat(item, f"{at}.{key}").items()}


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
