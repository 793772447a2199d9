"""Prompts: rows with a `prompt` (messages that end with the user's turn, or one user message as a string).

A row may also have `system` (the first message), `domain`, `answer`, `tests` and `entry_point`, which later steps read,
`id`, and `dataset`, by which `fusemega select` counts. Prompts with the same messages are one prompt; the first row
counts.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from fusemega.config import Section
from fusemega.errors import UserError
from fusemega.runtime.console import say
from fusemega.text.conversation import Message, parse_messages, with_system
from fusemega.text.data import DataConfig, Source
from fusemega.text.fields import BadRow, check_extras, kind, string

ABOUT = ("domain", "answer", "tests", "entry_point", "id", "dataset")
"""What a row says of its prompt, besides the prompt itself."""
_DECIDE = ("domain", "answer", "tests", "entry_point")  # what a duplicate must agree on to be a mere repetition


class PromptsConfig(Section):
    """Where prompts come from."""

    path: str | list[str] = Field(description="file, folder, glob or `datasets` hub name; or a list of the first three")
    name: str | None = Field(None, description="the hub data set's configuration, if it has several")
    split: str | None = Field(
        None, description="which split of a hub or saved data set, a folder or a glob; default: train"
    )
    on_bad_row: Literal["error", "skip"] = Field("error", description="stop at an unusable row, or skip and count it")
    unknown_fields: Literal["error", "ignore"] = Field(
        "error", description="an unknown field is an error, or is left out and counted"
    )
    limit: int | None = Field(None, ge=1, description="use only this many rows, the first ones")


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        key: `prompt_key` of its messages.
        messages: objects with role, content and what else the chat template needs.
        about: what the row has of `ABOUT`: texts.
        source: file and line of the row, for messages.
    """

    key: str
    messages: tuple[Mapping[str, Any], ...]
    about: Mapping[str, str]
    source: str


@dataclass(frozen=True)
class Prompts:
    """All prompts, in the order of their rows.

    Attributes:
        by_key: key -> prompt.
        rows: rows that were read.
        duplicates: rows whose messages an earlier row has.
        differing: of these, rows that have another domain, answer or tests than the first one.
        skipped: reason -> rows left out, with on_bad_row: skip.
    """

    by_key: Mapping[str, Prompt]
    rows: int
    duplicates: int = 0
    differing: tuple[str, ...] = ()
    skipped: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.by_key)


def prompt_key(messages: Iterable[Mapping[str, Any]]) -> str:
    """32 hex digits that only the messages decide, whatever the order of their keys.

    >>> prompt_key([{"role": "user", "content": "Hi"}]) == prompt_key([{"content": "Hi", "role": "user"}])
    True
    """
    text = json.dumps([dict(m) for m in messages], ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def read_prompts(config: PromptsConfig, tell: bool = True) -> Prompts:
    """Reads all prompts; says once what was left out, unless `tell` is false.

    Raises:
        UserError: a row without a usable prompt (its file and line), or no prompt at all.
    """
    source = Source(DataConfig(path=config.path, name=config.name, split=config.split))
    ignored: Counter[str] | None = Counter() if config.unknown_fields == "ignore" else None
    by_key: dict[str, Prompt] = {}
    skipped: Counter[str] = Counter()
    rows = duplicates = 0
    differing: list[str] = []
    for row in source.rows():
        if rows == config.limit:
            break
        rows += 1
        place = f"{source.names[row.file]}:{row.number}"
        try:
            prompt = parse_prompt(row.value, ignored, place)
        except BadRow as error:
            if config.on_bad_row == "error":
                raise UserError(f"{place}: {_detail(error)}") from None
            skipped[error.reason] += 1
            continue
        first = by_key.setdefault(prompt.key, prompt)
        if first is not prompt:
            duplicates += 1
            if any(first.about.get(name) != prompt.about.get(name) for name in _DECIDE):
                differing.append(f"{place} ({first.source})")
    names = ", ".join(source.names)
    if not by_key:
        found = f" ({_listed(skipped)})" if skipped else ""
        raise UserError(f"{names}: no prompts in {rows} rows{found}")
    everything = Prompts(by_key, rows, duplicates, tuple(differing), skipped)
    if tell:
        _tell(names, everything, ignored)
    return everything


def parse_prompt(row: object, ignored: Counter[str] | None, place: str) -> Prompt:
    """The prompt of one row.

    Args:
        ignored: counts unknown fields by name, which are left out; None: they are refused.
        place: file and line.

    Raises:
        BadRow: no prompt, or one that does not end with the user's turn; a field of another type; an unknown field.
    """
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, Mapping):
        raise BadRow("wrong type", f"a row is an object with a prompt, found {kind(row)}")
    present = {str(name): value for name, value in row.items() if value is not None}
    if "prompt" not in present:
        raise BadRow("no prompt", f"the row has no prompt (keys: {', '.join(sorted(present)) or 'none'})")
    check_extras(present, ("prompt", "system", *ABOUT), "the row", ignored)
    given = present["prompt"]
    if isinstance(given, str):
        given = [{"role": "user", "content": string(given, "prompt")}]
    messages = with_system(parse_messages(given, "prompt", False, ignored), present)
    if messages[-1].role != "user":
        raise BadRow("no user turn", f"prompt ends with a turn of role {messages[-1].role[:40]}; allowed: user")
    if not messages[-1].content.strip():
        raise BadRow("empty", "the prompt's last turn is empty")
    about = {name: _text(present[name], name) for name in ABOUT if name in present}
    plain = plain_messages(messages)
    return Prompt(prompt_key(plain), plain, about, place)


def plain_messages(messages: Sequence[Message]) -> tuple[dict[str, Any], ...]:
    """Messages as objects of role, content, and what else a chat template is given."""
    return tuple(
        {
            "role": message.role,
            "content": message.content,
            **({"reasoning_content": message.reasoning} if message.reasoning else {}),
            **message.fields,
        }
        for message in messages
    )


def _text(value: object, key: str) -> str:
    """Numbers become texts: an answer is often one."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return string(value, key)


def _detail(error: BadRow) -> str:
    return error.detail.replace("data.unknown_fields", "prompts.unknown_fields")


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} ({reason})" for reason, count in counts.items())


def _tell(names: str, prompts: Prompts, ignored: Counter[str] | None) -> None:
    line = f"{names}: {len(prompts)} prompts in {prompts.rows} rows"
    if prompts.duplicates:
        line += f"; {prompts.duplicates} duplicates left out"
    if prompts.differing:
        line += f", {len(prompts.differing)} of them with another domain, answer or tests: {prompts.differing[0]}"
    if prompts.skipped:
        line += f"; skipped {_listed(prompts.skipped)}"
    if ignored:
        line += f"; fields left out: {_listed(ignored)}"
    say(line)
