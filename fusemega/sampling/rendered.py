"""Prompts as a model reads them: rendered by the chat template once, and tokenized without further special tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fusemega.errors import UserError
from fusemega.hf.hub import resolve
from fusemega.hf.loadable import closing_id
from fusemega.text.fields import BadRow
from fusemega.text.templates import ChatTemplate
from fusemega.text.tokenizer import Tokenizer


class PromptIds:
    """The token ids of prompts.

    Args:
        source: folder or hub id with the tokenizer.
        template_file: in place of the tokenizer's chat template.
        trust_remote_code: let the folder bring its own Python code.
        variables: further variables of the chat template, such as `enable_thinking`.
        opens_with: what the answer's turn begins with; the model goes on from there.

    Attributes:
        tokenizer: the tokenizer.
        identity: what the ids depend on.
        closing_id: the token with which the template closes a turn, if it does with one token.

    Raises:
        UserError: no tokenizer, or no chat template.
    """

    def __init__(
        self,
        source: str | Path,
        template_file: str | None = None,
        trust_remote_code: bool = False,
        variables: Mapping[str, Any] = MappingProxyType({}),
        opens_with: str = "",
    ) -> None:
        self.tokenizer = Tokenizer.load(resolve(source), trust_remote_code).with_template(template_file)
        template = self.tokenizer.chat_template
        if template is None:
            raise UserError(
                f"{source}: the tokenizer has no chat template, with which prompts become text; give "
                "engine.chat_template: FILE"
            )
        self._template = ChatTemplate(template, self.tokenizer)
        self._variables, self._opens_with = dict(variables), opens_with
        self.identity: dict[str, Any] = {
            "tokenizer": self.tokenizer.content_hash,
            "template": self.tokenizer.template_hash,
        }
        if variables:
            self.identity["template_variables"] = dict(variables)
        if opens_with:
            self.identity["opens_with"] = opens_with
        self.closing_id = closing_id(self.tokenizer)

    def ids(self, messages: Sequence[Mapping[str, Any]], place: str) -> list[int]:
        """The ids of a prompt with the beginning of the answer's turn.

        Args:
            messages: of the prompt.
            place: names the prompt in messages.

        Raises:
            UserError: the template refuses the conversation, or writes bos twice.
        """
        try:
            text = self._template.render(messages, add_generation_prompt=True, **self._variables)
        except BadRow as error:
            raise UserError(f"prompt {place}: {error.detail}") from None
        found: list[int] = self.tokenizer.encode([text + self._opens_with])[0].ids.tolist()
        if doubled := self.doubled_bos(found):
            raise UserError(f"prompt {place}: the chat template of {self.tokenizer.template_source} writes {doubled}")
        return found

    def doubled_bos(self, ids: Sequence[int]) -> str | None:
        """Says that a text begins with two bos tokens; None where it does not."""
        bos = self.tokenizer.hf.bos_token_id
        # Where bos also opens each turn (as in some templates) it is no doubled one unless both are neighbours.
        if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
            return f"the token {self.tokenizer.token(bos)!r} twice at the beginning"
        return None
