"""A model's two modes: how each prompt is rendered, and the prefill that both share.

A template that ignores the switch is found by rendering both modes and comparing. Where the renderings differ only
after the user's turn, the prefill is what they have in common, so that it serves the switcher and whichever mode is
chosen; where they differ before it (gpt-oss writes the effort into the system turn), it is the long mode's prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from fusemega.checkpoint.megatron_folder import is_megatron_folder, open_megatron
from fusemega.config import Section
from fusemega.errors import UserError
from fusemega.hf.hub import resolve
from fusemega.switch.families import EMPTY_BLOCK, LONG, MODES, SHORT, FamilyName, Mode, families
from fusemega.text.fields import BadRow
from fusemega.text.templates import ChatTemplate
from fusemega.text.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]
_QUESTION = "How many legs have 3 spiders?"
_PROBES: tuple[Messages, ...] = (
    ({"role": "user", "content": _QUESTION},),
    (
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": _QUESTION},
    ),
)


class ModesConfig(Section):
    """How the model is told to think or not to."""

    family: Literal["auto"] | FamilyName = Field(
        "auto", description="which switch the chat template has; auto: the first that changes what it renders"
    )
    short_effort: str = Field("low", description="family reasoning_effort: its value in the short mode")
    long_effort: str = Field("high", description="family reasoning_effort: its value in the long mode")
    chat_template: str | None = Field(None, description="file with a jinja chat template that replaces the tokenizer's")

    @model_validator(mode="after")
    def _two_efforts(self) -> ModesConfig:
        """The two efforts differ."""
        if self.short_effort == self.long_effort:
            raise ValueError(f"short_effort and long_effort are both {self.long_effort!r}; allowed: two values")
        return self


class Modes:
    """The two modes of one model.

    Args:
        config: which family; `auto` finds it.
        source: folder or hub id with the tokenizer, or a folder of `fusemega convert import` or a run.
        trust_remote_code: let the folder bring its own Python code.

    Attributes:
        name, family: the family.
        tokenizer: the tokenizer, with the template in use.
        opens_with: what the short mode puts after the template's text; "" unless the family is `empty_think`.
        shared: whether the prefill is what both modes have in common; else it is the long mode's prompt.

    Raises:
        UserError: no chat template; the template has no second mode, or ignores the one asked for.
    """

    def __init__(self, config: ModesConfig, source: str | Path, trust_remote_code: bool = False) -> None:
        self._config, self._source = config, source
        folder = resolve(source)
        if is_megatron_folder(folder):
            folder = open_megatron(folder).hf
        self.tokenizer = Tokenizer.load(folder, trust_remote_code).with_template(config.chat_template)
        template = self.tokenizer.chat_template
        if template is None:
            raise UserError(
                f"{source}: the tokenizer has no chat template, so it has no modes; give modes.chat_template"
            )
        self._text, self._template = template, ChatTemplate(template, self.tokenizer)
        self._known = families(config.short_effort, config.long_effort)
        self.name = self._found() if config.family == "auto" else self._checked(config.family)
        self.family = self._known[self.name]
        self.opens_with = self._opening() if self.name == "empty_think" else ""
        self.shared = all(self._differ_after_question(probe) for probe in _PROBES)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the two renderings (JSON-able)."""
        efforts = {"efforts": [self._config.short_effort, self._config.long_effort]}
        return {
            "family": self.name,
            **(efforts if self.name == "reasoning_effort" else {}),
            "tokenizer": self.tokenizer.content_hash,
            "template": self.tokenizer.template_hash,
        }

    @cached_property
    def begins_thinking(self) -> bool:
        """Whether the long mode's prompt has opened the thinking block, so that a response begins inside of it."""
        return self.render(_PROBES[0], LONG).rstrip().endswith("<think>")

    @property
    def prefill_words(self) -> str:
        """Where hidden states are read, for the record."""
        return f"{self.name}, {'what both modes share' if self.shared else 'the long mode'}"

    def mode(self, name: str) -> Mode:
        """The mode of a name."""
        return self.family.mode(name)

    def render(self, messages: Messages, name: str) -> str:
        """The prompt's text in one mode, with the beginning of the answer's turn.

        Raises:
            BadRow: the template refuses the conversation.
        """
        mode = self.mode(name)
        text = self._template.render(messages, add_generation_prompt=True, **mode.variables)
        return text + (self.opens_with if mode.empty_block else "")

    def ids(self, messages: Messages, name: str, place: str) -> list[int]:
        """The prompt's token ids in one mode.

        Args:
            messages: of the prompt.
            name: of the mode.
            place: names the prompt in messages.

        Raises:
            UserError: the template refuses the conversation.
        """
        try:
            text = self.render(messages, name)
        except BadRow as error:
            raise UserError(f"prompt {place}: {error.detail}") from None
        found: list[int] = self.tokenizer.encode([text])[0].ids.tolist()
        return found

    def prefill(self, messages: Messages, place: str) -> list[int]:
        """The token ids at whose end the switcher reads its features.

        Raises:
            UserError: the template refuses the conversation.
        """
        long = self.ids(messages, LONG, place)
        if not self.shared:
            return long
        short = self.ids(messages, SHORT, place)
        same = next(
            (i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), min(len(short), len(long))
        )
        return long[:same]

    def request(self, body: Mapping[str, Any], name: str) -> dict[str, Any]:
        """A chat completion request with the mode's fields in it; what else it has stays.

        `empty_think` is sent as the beginning of the assistant's message, which vLLM and SGLang continue.
        """
        mode, changed = self.mode(name), dict(body)
        for key, value in mode.request.items():
            known = changed.get(key)
            changed[key] = {**known, **value} if isinstance(known, Mapping) and isinstance(value, Mapping) else value
        if mode.empty_block:
            changed["messages"] = [*body["messages"], {"role": "assistant", "content": self.opens_with}]
            changed |= {"add_generation_prompt": False, "continue_final_message": True}
        return changed

    def check_server(self) -> None:
        """Refuses a family that servers with this template could not be told.

        Raises:
            UserError: the template drops an empty block from an assistant's message.
        """
        if self.name != "empty_think":
            return
        message = {"role": "assistant", "content": self.opens_with}
        probe = _PROBES[0]
        text = self._template.render([*probe, message], add_generation_prompt=False)
        if not text.startswith(self.render(probe, SHORT).rstrip()):
            raise UserError(
                f"{self._source}: the chat template drops {self.opens_with!r} from an assistant's message, so a server "
                "cannot be told the short mode; start it with a template that has a switch "
                "(docs/switch.md#a-template-with-a-switch), and give it as modes.chat_template"
            )

    def _found(self) -> str:
        for name in self._known:
            if name != "empty_think" and self._switches(name):
                return name
        if self._has_block():
            return "empty_think"
        raise UserError(
            f"{self.tokenizer.template_source}: the chat template has no second mode: it renders the same with "
            f"{', '.join(name for name in self._known if name not in ('empty_think', 'thinking_type'))} on and off, "
            "and "
            "has no thinking block that could be left empty; a switcher needs two modes (modes.family, "
            "modes.chat_template)"
        )

    def _checked(self, name: str) -> str:
        if name == "empty_think":
            if not self._has_block():
                raise UserError(
                    f"modes.family: empty_think, and {self.tokenizer.template_source} has no </think>, neither in its "
                    "chat template nor as a token: the model has not learned to think in such a block"
                )
        elif not self._switches(name):
            others = [other for other in self._known if other != "empty_think" and self._switches(other)]
            others += ["empty_think"] * self._has_block()
            raise UserError(
                f"modes.family: {name}, and the chat template of {self.tokenizer.template_source} ignores it: both "
                "modes "
                f"render the same; it has: {', '.join(others) or 'no second mode'}"
            )
        return name

    def _switches(self, name: str) -> bool:
        """Whether the template renders a family's two modes differently."""
        short, long = self._known[name].short, self._known[name].long
        try:
            return self._template.render(_PROBES[0], add_generation_prompt=True, **short.variables) != (
                self._template.render(_PROBES[0], add_generation_prompt=True, **long.variables)
            )
        except BadRow:
            return False

    def _has_block(self) -> bool:
        return "</think>" in self._text or "</think>" in self.tokenizer.added_tokens

    def _opening(self) -> str:
        """An empty block after what the template opens the turn with, which may be the block's beginning."""
        text = self._template.render(_PROBES[0], add_generation_prompt=True)
        begun = text.rstrip()
        if not begun.endswith("<think>"):
            return EMPTY_BLOCK
        return EMPTY_BLOCK.removeprefix("<think>" + text[len(begun) :][:1])

    def _differ_after_question(self, probe: Messages) -> bool:
        try:
            short, long = (self.render(probe, name) for name in MODES)
        except BadRow:  # a template without system turns, for example
            return True
        same = next(
            (i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), min(len(short), len(long))
        )
        return same >= long.rfind(_QUESTION) + len(_QUESTION) and _QUESTION in long
