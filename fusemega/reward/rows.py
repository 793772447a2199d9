"""Rows of a prompt with several responses, which are written again with something added to each response.

    {"prompt": ..., "responses": [{"text": ...}, ...], "domain": ..., "answer": ..., "tests": ..., "entry_point": ...}

A prompt is a list of messages or a string; a response a string, a list of messages, or an object with text or messages.
Whatever else a row or a response has is written again as it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusemega.errors import UserError
from fusemega.text.data import DataConfig, Source
from fusemega.text.fields import BadRow, kind

ABOUT = ("domain", "answer", "tests", "entry_point")


@dataclass(frozen=True)
class GroupRow:
    """One row.

    Attributes:
        value: the row as it was read.
        messages: the prompt.
        texts: what each response says: the last message, of messages.
        about: what the row has of `ABOUT`, as texts.
        place: file and line.
    """

    value: Mapping[str, Any]
    messages: tuple[Mapping[str, Any], ...]
    texts: tuple[str, ...]
    about: Mapping[str, str]
    place: str

    @property
    def domain(self) -> str:
        """The row's domain, for counts."""
        return self.about.get("domain", "(no domain)")

    def with_added(self, added: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The row, with some more keys in each response."""
        responses = [
            {**(each if isinstance(each, Mapping) else {_name(each): each}), **more}
            for each, more in zip(self.value["responses"], added, strict=True)
        ]
        return {**self.value, "responses": responses}


def read_rows(paths: str | Sequence[str], adds: Sequence[str]) -> list[GroupRow]:
    """All rows.

    Args:
        paths: files, as a run file's data.path.
        adds: the keys that responses are about to get.

    Raises:
        UserError: an unusable row, or one whose responses have such a key already (file and line); no rows.
    """
    source = Source(DataConfig(path=paths if isinstance(paths, str) else list(paths)))
    found = []
    for row in source.rows():
        place = f"{source.names[row.file]}:{row.number}"
        try:
            found.append(_parsed(row.value, adds, place))
        except BadRow as error:
            raise UserError(f"{place}: {error.detail}") from None
    if not found:
        raise UserError(f"{', '.join(source.names)}: no rows")
    return found


def write_rows(out: Path, rows: Iterable[GroupRow], added: Callable[[GroupRow], Sequence[Mapping[str, Any]]]) -> None:
    """Writes the rows, with what `added` gives for each response."""
    with open(out, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row.with_added(added(row)), ensure_ascii=False) + "\n")


def key_of(*parts: Any) -> str:
    """32 hex digits that only `parts` (JSON-able) decide."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _parsed(value: Any, adds: Sequence[str], place: str) -> GroupRow:
    if isinstance(value, BadRow):
        raise value
    if not isinstance(value, Mapping):
        raise BadRow("wrong type", f"a row is an object with prompt and responses, found {kind(value)}")
    present = {str(name): each for name, each in value.items() if each is not None}
    for name in ("prompt", "responses"):
        if name not in present:
            raise BadRow("unknown shape", f"the row has no {name} (keys: {', '.join(sorted(present)) or 'none'})")
    prompt, responses = present["prompt"], present["responses"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, (list, tuple)) or not all(isinstance(m, Mapping) and "role" in m for m in prompt):
        raise BadRow("wrong type", "prompt is a string or a list of messages with role and content")
    if not isinstance(responses, (list, tuple)) or not responses:
        raise BadRow("wrong type", f"responses is a list of one or more responses, found {kind(responses)}")
    given = [name for name in adds if name in present or f"{name}s" in present]
    for i, each in enumerate(responses):
        given += [f"responses[{i}].{name}" for name in adds if isinstance(each, Mapping) and each.get(name) is not None]
    if given:
        raise BadRow("unsupported field", f"the row has {given[0]} already; remove the old ones first")
    texts = tuple(_text(each, f"responses[{i}]") for i, each in enumerate(responses))
    about = {}
    for name in ABOUT:
        each = present.get(name)
        if isinstance(each, (int, float)) and not isinstance(each, bool):
            each = str(each)
        if each is not None and not isinstance(each, str):
            raise BadRow("wrong type", f"{name} is a text, found {kind(each)}")
        if each:
            about[name] = each
    try:
        json.dumps(dict(value), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadRow("wrong type", f"the row cannot be written as JSON: {error}") from None
    return GroupRow(value, tuple(prompt), texts, about, place)


def _text(response: Any, key: str) -> str:
    if isinstance(response, Mapping):
        names = [name for name in ("text", "messages") if response.get(name) is not None]
        if len(names) != 1:
            raise BadRow(
                "wrong type", f"{key} has {' and '.join(names) or 'neither'}; allowed: one of text and messages"
            )
        response, key = response[names[0]], f"{key}.{names[0]}"
    if isinstance(response, (list, tuple)) and response and isinstance(response[-1], Mapping):
        response, key = response[-1].get("content"), f"{key}[{len(response) - 1}].content"
    if not isinstance(response, str):
        raise BadRow("wrong type", f"{key} is a text, found {kind(response)}")
    return response


def _name(response: Any) -> str:
    return "text" if isinstance(response, str) else "messages"
