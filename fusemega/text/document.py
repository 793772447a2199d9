"""One row of data, in one of TRL's shapes, as a conversation or a text, or the reason it is neither.

Shapes, tried in this order (a key whose value is null counts as absent):
    messages               [{"role": ..., "content": ...}, ...]: every assistant turn is supervised
    prompt + completion    two strings, or two lists of messages: only the completion is supervised
    text                   a string: everything is supervised

Beside its shape's keys a row, and beside role and content a message, may hold a name for it (`_NAMES`) and flags that
say whether it is to be learnt (`FLAGS`: true or 1, false or 0). Whatever else is there might change the meaning:
it is refused, or where `data.unknown_fields` is "ignore" counted; what is known to change it is refused always.
An empty text, list or object counts as absent.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Which tokens are supervised, by the name that stores carry; `parse` and `fusemega.text.sample` decide it.
MASK_POLICY = "assistant turns with their closing token; completions; whole texts with eos"

# Whether a row or a turn is to be learnt, as OpenAI, axolotl, ms-swift, slime and TRL spell it.
FLAGS = ("weight", "train", "training", "loss", "label", "loss_mask", "step_loss_mask")
# Names and origins of a row: they change nothing of what is learnt.
_NAMES = ("id", "uuid", "idx", "index", "source", "dataset")
# Fields that change what a template renders and that this package does not carry: refused whatever the settings.
_MEANINGFUL = (
    *("tools", "tool_calls", "tool_call_id", "function_call", "functions", "documents", "chat_template_kwargs"),
    *("system", "thinking", "reasoning", "reasoning_content", "images", "videos", "audios"),
)


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


class NotLearnt(BadRow):
    """A row whose own flags say that nothing of it is to be learnt: counted and left out, never an error."""

    def __init__(self) -> None:
        super().__init__("marked as not to be learnt", "the row's flags say that nothing of it is to be learnt")


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


def parse(row: object, ignored: Counter[str] | None = None) -> Document:
    """The conversation or text in `row`.

    Args:
        ignored: counts unknown fields by name, which are left out; None: they are refused.

    Raises:
        NotLearnt: flags of the row or of its turns leave nothing to learn.
        BadRow: not an object, none of the three shapes, wrong types, empty, no assistant turn, or a field
            that changes the meaning of the conversation and is not supported, or is unknown.
    """
    if not isinstance(row, Mapping):
        raise BadRow("wrong type", f"a row is an object, found {_kind(row)}")
    present = {str(key): value for key, value in row.items() if value is not None}
    if not present:
        raise BadRow("empty", "the row is empty")
    shape: tuple[str, ...]
    document: Document
    if "messages" in present:
        shape = ("messages",)
        document = _chat(_messages(present["messages"], "messages", True, ignored), present["messages"])
    elif "prompt" in present and "completion" in present:
        shape = ("prompt", "completion")
        document = _prompt_completion(present["prompt"], present["completion"], ignored)
    elif "text" in present:
        shape = ("text",)
        text = _string(present["text"], "text")
        if not text.strip():
            raise BadRow("empty", "text is empty")
        document = Text(text, 0)
    else:
        raise BadRow(
            "unknown shape",
            f"found the keys {', '.join(sorted(present))}; expected messages, or prompt and completion, or text",
        )
    _check_extras(present, shape, "the row", ignored)
    if _learnt(present, "the row") is False:
        raise NotLearnt
    return document


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


def _prompt_completion(prompt: object, completion: object, ignored: Counter[str] | None) -> Document:
    if isinstance(prompt, str) and isinstance(completion, str):
        _string(prompt, "prompt")
        if not _string(completion, "completion"):
            raise BadRow("empty", "completion is empty")
        return Text(prompt + completion, len(prompt))
    if isinstance(prompt, str) or isinstance(completion, str):
        raise BadRow("wrong type", "prompt and completion must both be strings or both be lists of messages")
    before, after = _messages(prompt, "prompt", False, ignored), _messages(completion, "completion", True, ignored)
    return _chat(before + after, completion)


def _chat(messages: tuple[Message, ...], learnable: Any) -> Chat:
    """`learnable`: the messages as given of which assistants' turns are learnt, unless flags say otherwise."""
    if not any(message.supervised for message in messages):
        if any(item["role"] == "assistant" for item in learnable):
            raise NotLearnt
        roles = ", ".join(message.role for message in messages)
        raise BadRow("no assistant turn", f"no assistant turn to learn from (roles: {roles})")
    return Chat(messages)


def _messages(value: object, key: str, supervise: bool, ignored: Counter[str] | None) -> tuple[Message, ...]:
    if not isinstance(value, (list, tuple)):
        raise BadRow("wrong type", f"{key} is a list of messages, found {_kind(value)}")
    if not value:
        raise BadRow("empty", f"{key} is empty")
    return tuple(_message(item, f"{key}[{i}]", supervise, ignored) for i, item in enumerate(value))


def _message(item: object, key: str, supervise: bool, ignored: Counter[str] | None) -> Message:
    if not isinstance(item, Mapping):
        raise BadRow("wrong type", f"{key} is an object with role and content, found {_kind(item)}")
    for field in ("role", "content"):
        if item.get(field) is None:
            raise BadRow("wrong type", f"{key} has no {field} (keys: {', '.join(sorted(map(str, item)))})")
    role = _string(item["role"], f"{key}.role")
    content = _string(item["content"], f"{key}.content")
    _check_extras(item, ("role", "content"), key, ignored)
    learnt = _learnt(item, key)
    if learnt and role != "assistant":
        raise BadRow("unsupported flag", f"{key} asks to learn a turn of role {role}; allowed: assistant")
    return Message(role, content, supervise and role == "assistant" and learnt is not False)


def _check_extras(
    fields: Mapping[str, object], known: tuple[str, ...], where: str, ignored: Counter[str] | None
) -> None:
    """Refuses or counts what is in `fields` beside `known`, names and flags."""
    for name, value in fields.items():
        if name in known or name in _NAMES or name in FLAGS or value is None or value in ("", [], (), {}):
            continue
        shown = repr(str(name)[:40]) if not str(name).isidentifier() else str(name)[:40]
        if name in _MEANINGFUL:
            raise BadRow("unsupported field", f"{where} has {shown}, which is not supported")
        if ignored is None:
            allowed = ", ".join((*known, *_NAMES, *FLAGS))
            raise BadRow(
                "unknown field",
                f"{where} has {shown}, which might change its meaning; allowed: {allowed} "
                "(data.unknown_fields: ignore would leave out and count such fields)",
            )
        ignored[str(name)] += 1


def _learnt(fields: Mapping[str, object], where: str) -> bool | None:
    """What the flags in `fields` say; None where there is none. False wins."""
    found = {name: fields[name] for name in FLAGS if fields.get(name) is not None}
    for name, value in found.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise BadRow("unsupported flag", f"{where} has {name}: {str(value)[:40]!r}; allowed: true or 1, false or 0")
    return all(found.values()) if found else None


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
