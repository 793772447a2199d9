"""What one document of a row is: a conversation or a text; and messages as a conversation, with their flags."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fusemega.text.fields import (
    CALLS,
    FLAGS,
    MESSAGE_FIELDS,
    NAMES,
    BadRow,
    check_extras,
    content_of,
    is_absent,
    kind,
    message_fields,
    row_settings,
    string,
)


class Dropped(BadRow):
    """A row that is counted and left out, never an error."""


class NotLearnt(Dropped):
    """A row whose own flags exclude all of it from training."""

    def __init__(self) -> None:
        super().__init__("marked as not to be trained on", "the row's flags exclude all of it from training")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role, content: as given.
        supervised: whether what the model writes of it, from reasoning to closing token, is trained on.
        reasoning: the reasoning before the content; "" for none.
        fields: others that the template is given (`fields.message_fields`).
    """

    role: str
    content: str
    supervised: bool
    reasoning: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stream_length(self) -> int:
        """Bytes in the canonical stream: a header; the reasoning and a byte after it; the content; an end of turn."""
        return len(self.content.encode()) + 2 + self.content_offset

    @property
    def content_offset(self) -> int:
        """Bytes between the header and the content."""
        return len(self.reasoning.encode()) + 1 if self.reasoning else 0


@dataclass(frozen=True)
class Chat:
    """A conversation with at least one supervised turn; `settings`: what else the template is given, by name."""

    messages: tuple[Message, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stream_length(self) -> int:
        """Bytes of the canonical stream."""
        return sum(message.stream_length for message in self.messages)


@dataclass(frozen=True)
class Text:
    """A text whose characters from `supervised_from` on are targets, followed by the end-of-text token."""

    text: str
    supervised_from: int


Document = Chat | Text


def with_system(messages: tuple[Message, ...], row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The conversation with the row's system text as its first message."""
    if is_absent(row.get("system")):
        return messages
    if any(message.role == "system" for message in messages):
        raise BadRow("unsupported field", "the row has system, and a message of role system; allowed: one of them")
    return (Message("system", string(row["system"], "system"), False), *messages)


def check_prompt(prompt: object, messages: tuple[Message, ...], key: str = "messages") -> None:
    """Refuses a prompt beside messages unless it repeats the first question (as in UltraChat) or the first messages.

    Args:
        key: the messages' name in the row.
    """
    if isinstance(prompt, str):
        first = next((message.content for message in messages if message.role == "user"), "")
        same = prompt.strip() == first.strip()
    else:
        turns = [(m.role, m.content) for m in parse_messages(prompt, "prompt", True, Counter())]
        asked = [(m.role, m.content) for m in messages]
        # The prompt may lack the conversation's first message (the system text).
        same = any(turns == asked[start : start + len(turns)] for start in (0, 1))
    if not same:
        raise BadRow("unsupported field", f"the row has prompt beside {key}, which is not what its {key} begin with")


def as_chat(messages: tuple[Message, ...], learnable: Any, row: Mapping[str, Any]) -> Chat:
    """The conversation. `learnable`: the given messages whose assistant turns are learnt unless flags exclude them."""
    if not any(message.supervised for message in messages):
        if any(item["role"] == "assistant" for item in learnable):
            raise NotLearnt
        roles = ", ".join(message.role for message in messages)
        raise BadRow("no assistant turn", f"no assistant turn to train on (roles: {roles})")
    return Chat(messages, row_settings(row))


def parse_messages(
    value: object, key: str, supervise: bool, ignored: Counter[str] | None, first: int = 0
) -> tuple[Message, ...]:
    """A list of messages.

    Args:
        key: its name in the row, for messages.
        supervise: whether assistant turns are trained on, unless flags exclude them.
        ignored: counts unknown fields by name; None: they are refused.
        first: number of the first one in that list, if it is a part of it.

    Raises:
        BadRow: no list, empty, or a message of another form.
    """
    if not isinstance(value, (list, tuple)):
        raise BadRow("wrong type", f"{key} is a list of messages, found {kind(value)}")
    if not value:
        raise BadRow("empty", f"{key} is empty")
    return tuple(_message(item, f"{key}[{i}]", supervise, ignored) for i, item in enumerate(value, start=first))


def _message(item: object, key: str, supervise: bool, ignored: Counter[str] | None) -> Message:
    if not isinstance(item, Mapping):
        raise BadRow("wrong type", f"{key} is an object with role and content, found {kind(item)}")
    calls = any(not is_absent(item.get(name)) for name in CALLS)
    for needed in ("role", "content"):
        if item.get(needed) is None and not (needed == "content" and calls):
            raise BadRow("wrong type", f"{key} has no {needed} (keys: {', '.join(sorted(map(str, item)))})")
    role = string(item["role"], f"{key}.role")
    content = content_of("" if item.get("content") is None else item["content"], f"{key}.content")
    check_extras(item, ("role", "content", *MESSAGE_FIELDS, *NAMES), key, ignored)
    reasoning, fields = message_fields(item, key)
    learnt = is_learnt(item, key)
    if learnt and role != "assistant":
        raise BadRow("unsupported flag", f"{key} asks to train on a turn of role {role}; allowed: assistant")
    if learnt and not supervise:
        raise BadRow("unsupported flag", f"{key} asks to train on a turn of the prompt; allowed: turns of the response")
    supervised = supervise and role == "assistant" and learnt is not False
    return Message(role, content, supervised, reasoning, fields)


def is_learnt(fields: Mapping[str, object], where: str) -> bool | None:
    """Whether the flags in `fields` allow training; None without flags. If they differ, the answer is False."""
    found = {name: fields[name] for name in FLAGS if fields.get(name) is not None}
    for name, value in found.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise BadRow("unsupported flag", f"{where} has {name}: {str(value)[:40]!r}; allowed: true or 1, false or 0")
    return all(found.values()) if found else None
