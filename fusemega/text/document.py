"""One row of data, in one of TRL's shapes, as a conversation or a text, or the reason it is neither.

Shapes, tried in this order (a key whose value is null counts as absent):
    messages               [{"role": ..., "content": ...}, ...]: every assistant turn is supervised
    prompt + completion    two strings, or two lists of messages: only the completion is supervised
    text                   a string: everything is supervised
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

# Which tokens are supervised, by the name that stores carry; `parse` and `fusemega.text.sample` decide it.
MASK_POLICY = "assistant turns with their closing token; completions; whole texts with eos"

# Fields that change what a template renders and that this package does not carry: never ignored in silence.
_MEANINGFUL_EXTRAS = ("tool_calls", "tools", "images", "reasoning_content")


class BadRow(Exception):
    """A row that cannot be used.

    Attributes:
        reason: a short category, the name under which skipped rows are counted.
        detail: the whole sentence, without the place of the row.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `supervised`: its content and closing token are targets."""

    role: str
    content: str
    supervised: bool


@dataclass(frozen=True)
class Chat:
    """A conversation with at least one supervised turn."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Text:
    """A text whose characters from `supervised_from` on are targets, followed by the end-of-text token."""

    text: str
    supervised_from: int


Document = Chat | Text


def parse(row: object) -> Document:
    """The conversation or text in `row`.

    Raises:
        BadRow: not an object, none of the three shapes, wrong types, empty, no assistant turn, or a field
            that changes the meaning of the conversation and is not supported.
    """
    if not isinstance(row, Mapping):
        raise BadRow("wrong type", f"a row is an object, found {_kind(row)}")
    present = {str(key): value for key, value in row.items() if value is not None}
    if not present:
        raise BadRow("empty", "the row is empty")
    _refuse_extras(present, "the row")
    if "messages" in present:
        return _chat(_messages(present["messages"], "messages", supervise=True))
    if "prompt" in present and "completion" in present:
        return _prompt_completion(present["prompt"], present["completion"])
    if "text" in present:
        text = _string(present["text"], "text")
        if not text.strip():
            raise BadRow("empty", "text is empty")
        return Text(text, 0)
    raise BadRow(
        "unknown shape",
        f"found the keys {', '.join(sorted(present))}; expected messages, or prompt and completion, or text",
    )


def canonical(document: Document) -> bytes:
    """The bytes that identify a document whatever the tokenizer and the template: UTF-8 JSON, sorted keys.

    `messages` and `prompt` + `completion` rows that supervise the same turns of the same conversation are equal.
    """
    if isinstance(document, Chat):
        fields: dict[str, object] = {
            "messages": [[message.role, message.content] for message in document.messages],
            "supervised": [i for i, message in enumerate(document.messages) if message.supervised],
        }
    else:
        fields = {"text": document.text, "supervised_from": len(document.text[: document.supervised_from].encode())}
    return json.dumps(fields, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode("utf-8")


def _prompt_completion(prompt: object, completion: object) -> Document:
    if isinstance(prompt, str) and isinstance(completion, str):
        _string(prompt, "prompt")
        if not _string(completion, "completion"):
            raise BadRow("empty", "completion is empty")
        return Text(prompt + completion, len(prompt))
    if isinstance(prompt, str) or isinstance(completion, str):
        raise BadRow("wrong type", "prompt and completion must both be strings or both be lists of messages")
    return _chat(_messages(prompt, "prompt", supervise=False) + _messages(completion, "completion", supervise=True))


def _chat(messages: tuple[Message, ...]) -> Chat:
    if not any(message.supervised for message in messages):
        roles = ", ".join(message.role for message in messages)
        raise BadRow("no assistant turn", f"no assistant turn to learn from (roles: {roles})")
    return Chat(messages)


def _messages(value: object, key: str, supervise: bool) -> tuple[Message, ...]:
    if not isinstance(value, (list, tuple)):
        raise BadRow("wrong type", f"{key} is a list of messages, found {_kind(value)}")
    if not value:
        raise BadRow("empty", f"{key} is empty")
    return tuple(_message(item, f"{key}[{i}]", supervise) for i, item in enumerate(value))


def _message(item: object, key: str, supervise: bool) -> Message:
    if not isinstance(item, Mapping):
        raise BadRow("wrong type", f"{key} is an object with role and content, found {_kind(item)}")
    for field in ("role", "content"):
        if item.get(field) is None:
            raise BadRow("wrong type", f"{key} has no {field} (keys: {', '.join(sorted(map(str, item)))})")
    _refuse_extras(item, key)
    role = _string(item["role"], f"{key}.role")
    return Message(role, _string(item["content"], f"{key}.content"), supervise and role == "assistant")


def _refuse_extras(fields: Mapping[str, object], where: str) -> None:
    for name in _MEANINGFUL_EXTRAS:
        if fields.get(name):
            raise BadRow("unsupported field", f"{where} has {name}, which is not supported")


def _string(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise BadRow("wrong type", f"{key} is a string, found {_kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow("invalid unicode", f"{key} holds a lone surrogate at character {error.start}") from None
    return value


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)
