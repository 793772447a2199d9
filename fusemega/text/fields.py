"""The fields of a row and a message beside the keys of their shape: names, flags, and input of chat templates.

Everything here is an allow-list. Fields of a message (`message_fields`) and settings of a row (`row_settings`) are
converted to the form that templates expect: reasoning under one name, the arguments of tool calls as objects.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any

# Whether a row or a turn is to be learnt, as OpenAI, axolotl, ms-swift, slime and TRL spell it.
FLAGS = ("weight", "train", "training", "loss", "label", "loss_mask", "step_loss_mask")
# Names, origins, kinds and gradings of a row: they change nothing of what is learnt.
NAMES = (
    *("id", "uuid", "idx", "index", "prompt_id", "conversation_id", "source", "dataset", "subset", "url", "license"),
    *("category", "topic", "domain", "task", "tags", "language", "lang", "score", "quality", "difficulty", "model"),
    *("created", "timestamp", "num_turns", "num_tokens"),
    *("rewards", "objectives"),  # as `fusemega score` writes them; of a group, rewards are part of its shape
)
# Aliases first to last; templates get the first one, and transformers gives them the others.
REASONING = ("reasoning_content", "reasoning", "thinking")
CALLS = ("tool_calls", "function_call")
# Fields of a message, beside role, content and flags.
MESSAGE_FIELDS = (*REASONING, *CALLS, "tool_call_id", "name")
# Fields of a row of messages that are given to the template, the first of them as a message.
ROW_FIELDS = ("system", "tools", "documents", "chat_template_kwargs")


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


def check_extras(
    fields: Mapping[str, object], known: tuple[str, ...], where: str, counted: Counter[str] | None
) -> None:
    """Refuses or counts what is in `fields` beside `known` and flags.

    Args:
        counted: counts fields by name; None: they are refused.
    """
    for name, value in fields.items():
        if name in known or name in FLAGS or is_absent(value):
            continue
        if counted is None:
            shown = repr(str(name)[:40]) if not str(name).isidentifier() else str(name)[:40]
            raise BadRow(
                "unknown field",
                f"{where} has {shown}, which might change its meaning; allowed: {', '.join((*known, *FLAGS))} "
                "(data.unknown_fields: ignore would leave out and count such fields)",
            )
        counted[str(name)] += 1


def is_absent(value: object) -> bool:
    """An empty text, list or object counts as absent, as does null."""
    return value is None or (isinstance(value, (str, list, tuple, Mapping)) and not value)


def content_of(value: object, key: str) -> str:
    """A message's content: a text, or a list of parts of type text, which are joined.

    Raises:
        BadRow: something else; a part of another type.
    """
    if not isinstance(value, (list, tuple)):
        return string(value, key)
    texts = []
    for i, part in enumerate(value):
        where = f"{key}[{i}]"
        if not isinstance(part, Mapping):
            raise BadRow("wrong type", f"{where} is an object with type and text, found {kind(part)}")
        if (found := part.get("type")) != "text":
            raise BadRow("unsupported part", f"{where} has the type {str(found)[:40]!r}; allowed: text")
        if other := [
            str(name) for name, field in part.items() if name not in ("type", "text") and not is_absent(field)
        ]:
            raise BadRow("unknown field", f"{where} has {other[0][:40]!r}; allowed: type, text")
        texts.append(string(part.get("text"), f"{where}.text"))
    return "".join(texts)


def message_fields(item: Mapping[str, Any], key: str) -> tuple[str, dict[str, Any]]:
    """A message's reasoning ("" without), and its other fields as templates expect them.

    Raises:
        BadRow: a field of another form.
    """
    given = {name: string(item[name], f"{key}.{name}") for name in REASONING if not is_absent(item.get(name))}
    if len(set(given.values())) > 1:
        raise BadRow("unsupported field", f"{key} has {' and '.join(given)}, which differ; allowed: one of them")
    fields: dict[str, Any] = {}
    for name in ("tool_call_id", "name"):
        if not is_absent(item.get(name)):
            fields[name] = string(item[name], f"{key}.{name}")
    if not is_absent(item.get("tool_calls")):
        calls = _decoded(item["tool_calls"], f"{key}.tool_calls", list)
        fields["tool_calls"] = [_call(call, f"{key}.tool_calls[{i}]") for i, call in enumerate(calls)]
    if not is_absent(item.get("function_call")):
        fields["function_call"] = _function(item["function_call"], f"{key}.function_call")
    return next(iter(given.values()), ""), fields


def row_settings(row: Mapping[str, Any]) -> dict[str, Any]:
    """The input of a row for the template beside messages: tools, documents, and chat_template_kwargs by their names.

    Raises:
        BadRow: a setting of another form, or one that is no template's.
    """
    settings: dict[str, Any] = {}
    for name in ("tools", "documents"):
        if not is_absent(row.get(name)):
            settings[name] = [dict(_mapping(e, f"{name}[{i}]")) for i, e in enumerate(_decoded(row[name], name, list))]
    if not is_absent(row.get("chat_template_kwargs")):
        for name, value in _decoded(row["chat_template_kwargs"], "chat_template_kwargs", dict).items():
            if value is None:  # in columnar files: a setting that only other rows have
                continue
            if not str(name).isidentifier() or name in _reserved() or name in settings:
                raise BadRow(
                    "unsupported field",
                    f"chat_template_kwargs has {str(name)[:40]!r}, which is no setting of a template",
                )
            settings[name] = value
    return settings


def string(value: object, key: str) -> str:
    """A text of valid Unicode, or a BadRow."""
    if not isinstance(value, str):
        raise BadRow("wrong type", f"{key} is a string, found {kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow("invalid unicode", f"{key} holds a lone surrogate at character {error.start}") from None
    return value


def kind(value: object) -> str:
    """The type of a value, in JSON's words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


@cache
def _reserved() -> frozenset[str]:
    """Names that no setting of a template can have, because transformers takes them as its own arguments."""
    from transformers import PreTrainedTokenizerBase
    from transformers.utils.chat_template_utils import render_jinja_template

    functions = (PreTrainedTokenizerBase.apply_chat_template, render_jinja_template)
    return frozenset({"messages"} | {name for each in functions for name in inspect.signature(each).parameters})


def _call(value: Any, key: str) -> dict[str, Any]:
    """One tool call, as {"type": "function", "function": {"name", "arguments"}} or flat, with its arguments decoded."""
    call = dict(_mapping(value, key))
    if "function" in call:
        return call | {"function": _function(call["function"], f"{key}.function")}
    return _function(call, key)


def _function(value: Any, key: str) -> dict[str, Any]:
    function = dict(_mapping(_decoded(value, key, dict), key))
    string(function.get("name"), f"{key}.name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        string(arguments, f"{key}.arguments")
        try:
            decoded = json.loads(arguments)
        except (ValueError, RecursionError):
            return function
        if isinstance(decoded, dict):
            function["arguments"] = decoded
    elif arguments is not None:
        _mapping(arguments, f"{key}.arguments")
    return function


def _mapping(value: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise BadRow("wrong type", f"{key} is an object, found {kind(value)}")
    return value


def _decoded(value: Any, key: str, wanted: type[list[Any]] | type[dict[str, Any]]) -> Any:
    """The list or object, decoded if it is given as JSON text: columnar files keep values of varying form as text."""
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(string(value, key))
        except (ValueError, RecursionError):
            found = value
    if not isinstance(found, (list, tuple) if wanted is list else Mapping):
        raise BadRow("wrong type", f"{key} is {'a list' if wanted is list else 'an object'}, found {kind(value)}")
    return found
