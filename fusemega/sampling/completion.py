"""A server's answer, as a completion or as the reason why it is none. Servers differ; only what is used is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusemega.files.json_files import MalformedError, parse_json
from fusemega.sampling.engine import STOP


class BrokenAnswer(Exception):
    """The server answered, but not with a completion. Another try may help."""


@dataclass(frozen=True)
class Completion:
    """What is read of an answer.

    Attributes:
        text: of the first choice; empty where it has none.
        finish_reason: as the server says it.
        prompt_tokens, tokens: of `usage`; None where it is not there.
        prompt_ids: ids of the prompt, from servers that give them (vLLM, with `return_token_ids: true`).
        reasoned: whether there was a reasoning apart from the text.
    """

    text: str
    finish_reason: str
    prompt_tokens: int | None
    tokens: int | None
    prompt_ids: tuple[int, ...] | None
    reasoned: bool


def parse_completion(content: bytes) -> Completion:
    """The completion in the body of an answer.

    Raises:
        BrokenAnswer: says why there is none.
    """
    try:
        answer = parse_json(content)
    except MalformedError as error:
        raise BrokenAnswer(str(error)) from None
    if not isinstance(answer, Mapping):
        raise BrokenAnswer("expected a JSON object")
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices:
        said = answer.get("error")
        raise BrokenAnswer(f"it says: {str(said)[:200]}" if said else "no choices")
    choice = choices[0]
    message = choice.get("message") if isinstance(choice, Mapping) else None
    if not isinstance(message, Mapping):
        raise BrokenAnswer("a choice without message")
    text = message.get("content")
    if text is not None and not isinstance(text, str):
        raise BrokenAnswer(f"a content of type {type(text).__name__}")
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise BrokenAnswer("a content with a lone surrogate") from None
    usage = answer.get("usage")
    usage = usage if isinstance(usage, Mapping) else {}
    return Completion(
        text=text or "",
        finish_reason=str(choice.get("finish_reason") or STOP),
        prompt_tokens=_count(usage.get("prompt_tokens")),
        tokens=_count(usage.get("completion_tokens")),
        prompt_ids=_ids(answer.get("prompt_token_ids")),
        reasoned=bool(message.get("reasoning_content") or message.get("reasoning")),
    )


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _ids(value: Any) -> tuple[int, ...] | None:
    return tuple(value) if isinstance(value, list) and all(type(item) is int for item in value) else None
