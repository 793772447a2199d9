"""One row of data, in one of TRL's shapes, as a conversation, a text or a group of them, or the reason it is none.

Shapes, tried in this order (a key whose value is null counts as absent):
    messages               [{"role": ..., "content": ...}, ...]: every assistant turn is supervised
    prompt + completion    two strings, or two lists of messages: only the completion is supervised
    prompt + chosen + rejected    twice prompt + completion: a pair, of which the first response is preferred
    chosen + rejected      two texts or conversations that begin alike: the beginning is the prompt
    prompt + responses     prompt + completion for each of a list: a group
    text                   a string: everything is supervised

`groups.py` has what pairs and groups may say of their responses (rewards, weights, ...). A row may also have names and
scores (`fields.NAMES`), some of which are reported once. A row and a message may have flags that say whether they are
trained on (`fields.FLAGS`: true or 1, false or 0). A row of messages may have input for the chat template: system (the
first message), tools, documents, chat_template_kwargs; a message may have reasoning, tool calls and a name. Any other
field might change the meaning: it is refused, or, with `data.unknown_fields: ignore`, counted. An empty text, list or
object counts as absent.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping

from fusemega.text.conversation import (
    Chat,
    Document,
    Dropped,
    Message,
    NotLearnt,
    Text,
    as_chat,
    check_prompt,
    is_learnt,
    parse_messages,
    with_system,
)
from fusemega.text.fields import NAMES, REASONING, ROW_FIELDS, BadRow, check_extras, kind, string
from fusemega.text.groups import SCALARS, Group, answered, parse_group

__all__ = [
    "MASK_POLICY",
    "SCALARS",
    "BadRow",
    "Chat",
    "Document",
    "Dropped",
    "Group",
    "Message",
    "NotLearnt",
    "Text",
    "canonical",
    "parse",
    "parse_row",
]

# Which tokens are supervised, by the name that stores carry; `parse` and `fusemega.text.sample` decide it.
MASK_POLICY = "assistant turns with their closing token; completions; whole texts with eos"


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
    if "messages" in present and not {"chosen", "rejected"} <= present.keys():
        shape = ("messages", *ROW_FIELDS)
        messages = with_system(parse_messages(present["messages"], "messages", True, ignored), present)
        document = as_chat(messages, present["messages"], present)
        if "prompt" in present:
            check_prompt(present["prompt"], messages)
            shape += ("prompt",)
    elif "prompt" in present and "completion" in present:
        shape = ("prompt", "completion")
        (document,) = answered(present, present["prompt"], {"completion": present["completion"]}, ignored, blank=True)
        shape += ROW_FIELDS if isinstance(document, Chat) else ()
    elif present.keys() & {"chosen", "rejected", "responses"}:
        document, shape = parse_group(present, ignored)
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
            "or chosen and rejected, or prompt with responses",
        )
    check_extras(present, (*shape, *NAMES), "the row", ignored)
    if told is not None:
        repeats = ("prompt", "messages") if "messages" in shape else ()  # of what the row says elsewhere
        told.update(name for name in present if name in NAMES and name not in shape)
        told.update(name for name in repeats if name in present and name != shape[0])
    # A group's weight is a number of its own.
    flags = {name: value for name, value in present.items() if name != "weight" or not isinstance(document, Group)}
    if is_learnt(flags, "the row") is False:
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
