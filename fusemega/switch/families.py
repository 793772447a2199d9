"""How models are told to think or not to: a table of the known ways.

Both modes are always sent, also the one that is the template's default: some servers think unless they are told not to,
and defaults change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

SHORT, LONG = "short", "long"
"""The two modes, in the order of columns: an answer at once, and an answer after reasoning."""
MODES = (SHORT, LONG)

FamilyName = Literal["enable_thinking", "thinking", "thinking_type", "reasoning_effort", "empty_think"]
EMPTY_BLOCK = "<think>\n\n</think>\n\n"


@dataclass(frozen=True)
class Mode:
    """One of a family's two modes.

    Attributes:
        variables: of the chat template.
        request: fields of a chat completion request that give the template these variables on a server.
        empty_block: whether the assistant's turn is opened with an empty thinking block.
    """

    variables: Mapping[str, Any] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)
    empty_block: bool = False


@dataclass(frozen=True)
class ModeFamily:
    """A way to choose between two modes.

    Attributes:
        short, long: the modes.
        models: for whom it is, in words.
        words: words in a user's message with which the user chooses.
    """

    short: Mode
    long: Mode
    models: str
    words: tuple[str, ...] = ()

    def mode(self, name: str) -> Mode:
        """The mode of a name."""
        return self.short if name == SHORT else self.long


def _template_switch(name: str) -> tuple[Mode, Mode]:
    short, long = ({name: value} for value in (False, True))
    return Mode(short, {"chat_template_kwargs": short}), Mode(long, {"chat_template_kwargs": long})


def families(short_effort: str = "low", long_effort: str = "high") -> dict[str, ModeFamily]:
    """All families by name, in the order in which they are tried.

    Args:
        short_effort, long_effort: the two values of `reasoning_effort`.
    """
    off, on = {"thinking": False}, {"thinking": True}
    low, high = {"reasoning_effort": short_effort}, {"reasoning_effort": long_effort}
    return {
        "enable_thinking": ModeFamily(
            *_template_switch("enable_thinking"), "Qwen3, GLM-4.5, SmolLM3 and others", ("/no_think", "/think")
        ),
        "thinking": ModeFamily(*_template_switch("thinking"), "DeepSeek-V3.1 and later, Granite-3.2 and later"),
        "thinking_type": ModeFamily(
            Mode(off, {"thinking": {"type": "disabled"}}),
            Mode(on, {"thinking": {"type": "enabled"}}),
            "servers with DeepSeek's own interface",
        ),
        "reasoning_effort": ModeFamily(Mode(low, low), Mode(high, high), "gpt-oss"),
        "empty_think": ModeFamily(
            Mode(empty_block=True), Mode(), "DeepSeek-R1's distillates, and templates without a switch"
        ),
    }


CHOICES = ("reasoning_effort", "reasoning", "thinking", "enable_thinking", "thinking_token_budget")
"""Fields of a request with which a user chooses the mode."""
TEMPLATE_CHOICES = ("enable_thinking", "thinking", "reasoning_effort")
"""The same inside `chat_template_kwargs`."""


def users_choice(body: Mapping[str, Any], family: ModeFamily) -> str | None:
    """The field or word with which a request chooses its mode itself; None where it leaves the choice open.

    >>> users_choice({"chat_template_kwargs": {"enable_thinking": True}}, families()["enable_thinking"])
    'chat_template_kwargs.enable_thinking'
    """
    for name in CHOICES:
        if body.get(name) is not None:
            return name
    given = body.get("chat_template_kwargs")
    for name in TEMPLATE_CHOICES:
        if isinstance(given, Mapping) and given.get(name) is not None:
            return f"chat_template_kwargs.{name}"
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        return None
    if isinstance(messages[-1], Mapping) and messages[-1].get("role") == "assistant":
        return "an assistant's message at the end"
    said = [_text(message) for message in messages if isinstance(message, Mapping) and message.get("role") == "user"]
    words = said[-1].split() if said else []
    return next((word for word in family.words if word in words), None)


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return " ".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""
