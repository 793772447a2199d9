"""One row of data, in one of TRL's shapes, as a conversation, a text or a group of them, or the reason it is none.

Shapes, tried in this order (a key whose value is null counts as absent):
    messages               [{"role": ..., "content": ...}, ...]: every assistant turn is supervised
    prompt + completion    two strings, or two lists of messages: only the completion is supervised
    prompt + chosen + rejected    twice prompt + completion: a pair, of which the first response is preferred
    prompt + responses     prompt + completion for each of a list: a group; rewards (or scores) has a number each
    text                   a string: everything is supervised

A row may also have names and scores (`fields.NAMES`), some of which are reported once. A row and a message may have
flags that say whether they are trained on (`fields.FLAGS`: true or 1, false or 0). A row of messages may have input for
the chat template: system (the first message), tools, documents, chat_template_kwargs; a message may have reasoning,
tool calls and a name. Any other field might change the meaning: it is refused, or, with `data.unknown_fields: ignore`,
counted. An empty text, list or object counts as absent.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fusemega.text.fields import (
    CALLS,
    FLAGS,
    MESSAGE_FIELDS,
    NAMES,
    REASONING,
    ROW_FIELDS,
    check_extras,
    content_of,
    is_absent,
    kind,
    message_fields,
    row_settings,
    string,
)
from fusemega.text.fields import BadRow as BadRow

# Which tokens are supervised, by the name that stores carry; `parse` and `fusemega.text.sample` decide it.
MASK_POLICY = "assistant turns with their closing token; completions; whole texts with eos"


class NotLearnt(BadRow):
    """A row whose own flags exclude all of it from training: counted and left out, never an error."""

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
SCALARS = ("chosen", "reward", "margin", "weight", "source")
"""Numbers that a response of a group may have: 1 for a pair's chosen and 0 for its rejected one; its reward; the margin
of its pair; its weight; the place of the name of its source in `TokenizedDataset.sources`."""


@dataclass(frozen=True)
class Group:
    """One prompt and several responses to it: each a document of its own, of which the response alone is supervised.

    Attributes:
        documents: in the order of the row; chosen before rejected.
        scalars: numbers of each document, by name; the names are in `SCALARS`.
    """

    documents: tuple[Document, ...]
    scalars: tuple[Mapping[str, float], ...]


def parse(row: object, ignored: Counter[str] | None = None, told: Counter[str] | None = None) -> Document:
    """The conversation or text in `row`. Arguments and errors as `parse_row`'s; a group is refused."""
    found = parse_row(row, ignored, told)
    if isinstance(found, Group):
        raise BadRow("several responses", "the row has several responses to one prompt; allowed here: one text each")
    return found


def parse_row(row: object, ignored: Counter[str] | None = None, told: Counter[str] | None = None) -> Document | Group:
    """The conversation, text or group in `row`.

    Example:
        >>> pair = parse_row({"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5"})
        >>> pair.documents[0], pair.scalars[0]
        (Text(text='2 + 2 = 4', supervised_from=8), {'chosen': 1.0})

    Args:
        ignored: counts unknown fields by name, which are left out; None: they are refused.
        told: counts names and gradings of the row, which change nothing.

    Raises:
        NotLearnt: flags of the row or of its turns leave nothing to learn.
        BadRow: not an object, none of the shapes, wrong types, empty, no assistant turn, or an unknown field.
    """
    if not isinstance(row, Mapping):
        raise BadRow("wrong type", f"a row is an object, found {kind(row)}")
    present = {str(key): value for key, value in row.items() if value is not None}
    if not present:
        raise BadRow("empty", "the row is empty")
    shape: tuple[str, ...]
    document: Document | Group
    if "messages" in present:
        shape = ("messages", *ROW_FIELDS)
        messages = _with_system(_messages(present["messages"], "messages", True, ignored), present)
        document = _chat(messages, present["messages"], present)
        if "prompt" in present:
            _check_prompt(present["prompt"], messages)
            shape += ("prompt",)
    elif "prompt" in present and "completion" in present:
        shape = ("prompt", "completion")
        (document,) = _responses(present, {"completion": present["completion"]}, ignored)
        shape += ROW_FIELDS if isinstance(document, Chat) else ()
    elif "prompt" in present and present.keys() & {"chosen", "rejected", "responses"}:
        document, shape = _group(present, ignored)
        shape += ROW_FIELDS if isinstance(document.documents[0], Chat) else ()
    elif "text" in present:
        shape = ("text",)
        text = string(present["text"], "text")
        if not text.strip():
            raise BadRow("empty", "text is empty")
        document = Text(text, 0)
    else:
        raise BadRow(
            "unknown shape",
            f"found the keys {', '.join(sorted(present))}; expected messages, or prompt and completion, or text, "
            "or prompt with chosen and rejected, or prompt with responses",
        )
    check_extras(present, (*shape, *NAMES), "the row", ignored)
    if told is not None:
        told.update(name for name in present if name in NAMES or (name == "prompt" and "messages" in shape))
    if _learnt(present, "the row") is False:
        raise NotLearnt
    return document


def canonical(document: Document) -> bytes:
    """The bytes that identify a document whatever the tokenizer and the template: UTF-8 JSON, sorted keys.

    `messages` and `prompt` + `completion` rows that supervise the same turns of the same conversation are equal.
    """
    if isinstance(document, Chat):
        fields: dict[str, object] = {
            "messages": [[m.role, m.content, *([_others(m)] if _others(m) else [])] for m in document.messages],
            "supervised": [i for i, message in enumerate(document.messages) if message.supervised],
        }
        if document.settings:
            fields["settings"] = document.settings
    else:
        fields = {"text": document.text, "supervised_from": len(document.text[: document.supervised_from].encode())}
    text = json.dumps(fields, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=str)
    return text.encode("utf-8")


def _others(message: Message) -> dict[str, object]:
    return ({REASONING[0]: message.reasoning} if message.reasoning else {}) | dict(message.fields)


def _with_system(messages: tuple[Message, ...], row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The conversation with the row's system text as its first message."""
    if is_absent(row.get("system")):
        return messages
    if any(message.role == "system" for message in messages):
        raise BadRow("unsupported field", "the row has system, and a message of role system; allowed: one of them")
    return (Message("system", string(row["system"], "system"), False), *messages)


def _check_prompt(prompt: object, messages: tuple[Message, ...]) -> None:
    """Refuses a prompt beside messages unless it repeats the first question (as in UltraChat) or the first messages."""
    if isinstance(prompt, str):
        first = next((message.content for message in messages if message.role == "user"), "")
        same = prompt.strip() == first.strip()
    else:
        turns = [(m.role, m.content) for m in _messages(prompt, "prompt", True, Counter())]
        asked = [(m.role, m.content) for m in messages]
        # The prompt may lack the conversation's first message (the system text).
        same = any(turns == asked[start : start + len(turns)] for start in (0, 1))
    if not same:
        raise BadRow(
            "unsupported field", "the row has prompt beside messages, which is not what its messages begin with"
        )


def _group(row: Mapping[str, Any], ignored: Counter[str] | None) -> tuple[Group, tuple[str, ...]]:
    """A pair or the responses to a prompt, and the keys that say so."""
    if "responses" not in row:
        for key in ("chosen", "rejected"):
            if key not in row:
                raise BadRow("unknown shape", f"the row has no {key}; expected prompt with both chosen and rejected")
        if row["chosen"] == row["rejected"]:
            raise BadRow("no preference", "chosen and rejected are the same")
        pair = _responses(row, {key: row[key] for key in ("chosen", "rejected")}, ignored)
        return Group(tuple(pair), ({"chosen": 1.0}, {"chosen": 0.0})), ("prompt", "chosen", "rejected")
    responses = row["responses"]
    if not isinstance(responses, (list, tuple)):
        raise BadRow("wrong type", f"responses is a list of responses, found {kind(responses)}")
    if len(responses) < 2:
        raise BadRow("empty", f"responses has {len(responses)}; a group has two or more")
    documents = _responses(row, {f"responses[{i}]": response for i, response in enumerate(responses)}, ignored)
    return Group(tuple(documents), _rewards(row, len(responses))), ("prompt", "responses", "rewards", "scores")


def _rewards(row: Mapping[str, Any], count: int) -> tuple[Mapping[str, float], ...]:
    given = [key for key in ("rewards", "scores") if not is_absent(row.get(key))]
    if not given:
        return ({},) * count
    if len(given) > 1:
        raise BadRow("unsupported field", "the row has rewards and scores; allowed: one of them")
    key, values = given[0], row[given[0]]
    if not isinstance(values, (list, tuple)) or len(values) != count:
        found = f"{len(values)} of them" if isinstance(values, (list, tuple)) else kind(values)
        raise BadRow("wrong type", f"{key} is a list of {count} numbers, one per response; found {found}")
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise BadRow("wrong type", f"{key}[{i}] is a finite number, found {str(value)[:40]!r}")
    return tuple({"reward": float(value)} for value in values)


def _responses(row: Mapping[str, Any], responses: Mapping[str, Any], ignored: Counter[str] | None) -> list[Document]:
    """The row's prompt with each of the responses (by their names in the row), which alone are supervised."""
    prompt = row["prompt"]
    for key, response in responses.items():
        if isinstance(prompt, str) != isinstance(response, str):
            raise BadRow("wrong type", f"prompt and {key} must both be strings or both be lists of messages")
    if isinstance(prompt, str):
        string(prompt, "prompt")
        for key, response in responses.items():
            if not string(response, key):
                raise BadRow("empty", f"{key} is empty")
        return [Text(prompt + response, len(prompt)) for response in responses.values()]
    before = _messages(prompt, "prompt", False, ignored)
    after = {key: _messages(response, key, True, ignored) for key, response in responses.items()}
    return [_chat(_with_system(before + after[key], row), responses[key], row) for key in responses]


def _chat(messages: tuple[Message, ...], learnable: Any, row: Mapping[str, Any]) -> Chat:
    """The conversation. `learnable`: the given messages whose assistant turns are learnt unless flags exclude them."""
    if not any(message.supervised for message in messages):
        if any(item["role"] == "assistant" for item in learnable):
            raise NotLearnt
        roles = ", ".join(message.role for message in messages)
        raise BadRow("no assistant turn", f"no assistant turn to train on (roles: {roles})")
    return Chat(messages, row_settings(row))


def _messages(value: object, key: str, supervise: bool, ignored: Counter[str] | None) -> tuple[Message, ...]:
    if not isinstance(value, (list, tuple)):
        raise BadRow("wrong type", f"{key} is a list of messages, found {kind(value)}")
    if not value:
        raise BadRow("empty", f"{key} is empty")
    return tuple(_message(item, f"{key}[{i}]", supervise, ignored) for i, item in enumerate(value))


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
    learnt = _learnt(item, key)
    if learnt and role != "assistant":
        raise BadRow("unsupported flag", f"{key} asks to train on a turn of role {role}; allowed: assistant")
    if learnt and not supervise:
        raise BadRow("unsupported flag", f"{key} asks to train on a turn of the prompt; allowed: turns of the response")
    supervised = supervise and role == "assistant" and learnt is not False
    return Message(role, content, supervised, reasoning, fields)


def _learnt(fields: Mapping[str, object], where: str) -> bool | None:
    """Whether the flags in `fields` allow training; None without flags. If they differ, the answer is False."""
    found = {name: fields[name] for name in FLAGS if fields.get(name) is not None}
    for name, value in found.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise BadRow("unsupported flag", f"{where} has {name}: {str(value)[:40]!r}; allowed: true or 1, false or 0")
    return all(found.values()) if found else None
