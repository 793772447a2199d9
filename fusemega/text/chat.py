"""A document as the one string that is tokenized, and where in it each message's content lies.

A conversation is rendered once by the chat template. Where the contents ended up is learnt by rendering the same
roles with placeholders in place of the contents: that gives the template's literal pieces, and the real rendering
must be exactly those pieces with the contents (or the contents stripped of outer white space) between them.
Otherwise the row is refused with the reason: a span is never guessed by searching for the content.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fusemega.errors import UserError
from fusemega.text.document import BadRow, Chat, Message, Text
from fusemega.text.templates import ChatTemplate
from fusemega.text.tokenizer import Tokenizer

_PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")
_Place = tuple[tuple[int, int], str]  # a content's range, and the literal after it


@dataclass(frozen=True)
class Span:
    """One message inside the rendered text; positions in characters unless said otherwise.

    Attributes:
        start, end: the content.
        closing_end: end of the turn's closing token; equal to `end` where the template has none there.
        supervised: range of targets: a token is one iff it *ends* in (supervised[0], supervised[1]]; None for none.
        base: byte of the canonical stream at which the message begins.
        has_header: whether the canonical stream has its virtual header byte (conversations do, texts do not).
        stripped_bytes: UTF-8 bytes that the template removed from the content's beginning.
        num_bytes: UTF-8 bytes of the whole content, as given.
    """

    start: int
    end: int
    closing_end: int
    supervised: tuple[int, int] | None
    base: int
    has_header: bool
    stripped_bytes: int
    num_bytes: int


@dataclass(frozen=True)
class Rendered:
    """The text to tokenize, its spans, and the length in bytes of the canonical stream.

    `framed`: a plain text, which gets the tokenizer's prefix (bos) before it and eos, supervised, after it.
    """

    text: str
    spans: tuple[Span, ...]
    stream_length: int
    framed: bool


def render_text(document: Text) -> Rendered:
    """A text as it is: one message without header byte, eos ending at its length + 1."""
    length, num_bytes = len(document.text), len(document.text.encode())
    span = Span(0, length, length, (document.supervised_from, length), 0, False, 0, num_bytes)
    return Rendered(document.text, (span,), num_bytes + 1, framed=True)


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template.

    Attributes:
        closing: what the template writes after an assistant's content, up to and including the first added token
            (without one, its text stripped on the right, so that `<|im_end|>\\n` closes with `<|im_end|>` in either
            case); learnt from a [user, assistant] conversation. "" where nothing closes a turn.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        template = tokenizer.chat_template
        if template is None:
            raise UserError(
                f"{tokenizer.source}: the tokenizer has no chat template, which rows with messages need "
                "(add chat_template.jinja to the folder, or give text or prompt + completion strings)"
            )
        self._template = ChatTemplate(template, tokenizer)
        self._tokenizer = tokenizer
        self._pieces: dict[tuple[tuple[str, ...], tuple[int, ...]], tuple[list[str], list[int]]] = {}
        self.closing = self._learn_closing()

    def render(self, chat: Chat) -> Rendered:
        """The conversation's text and a span for each message, in their order (none for an empty content that the
        template leaves out with its block).

        Raises:
            BadRow: the template refuses the conversation, drops, repeats or rewrites a content.
            OverBudget: it needs more time, memory or output than a conversation may.
        """
        messages = chat.messages
        text = self._apply([(message.role, message.content) for message in messages])
        roles = tuple(message.role for message in messages)
        everything = tuple(range(len(messages)))
        # Templates with `if content` leave out a block whose content is empty: there, an empty content is literal.
        filled = tuple(i for i in everything if messages[i].supervised or messages[i].content.strip())
        for shown in dict.fromkeys((everything, filled)):
            literals, order = self._learn_pieces(roles, shown)
            starts = _place(text, literals, [messages[i].content for i in order])
            if starts is not None:
                return self._spans(
                    text, messages, dict(zip(order, zip(starts, literals[1:], strict=True), strict=True))
                )
        raise BadRow(
            "template rewrites content",
            "the chat template does not reproduce the messages' contents as they are (it rewrites, moves or "
            "drops part of one), so what is supervised cannot be told",
        )

    def _spans(
        self, text: str, messages: Sequence[Message], placed: dict[int, tuple[tuple[int, int], str]]
    ) -> Rendered:
        spans, base = [], 0
        for i, message in enumerate(messages):
            num_bytes = len(message.content.encode())
            if i in placed:
                (start, end), after = placed[i]
                closing_end = end + len(self.closing) if after.startswith(self.closing) else end
                lead = message.content[: message.content.find(text[start:end])]
                supervised = (start, closing_end) if message.supervised else None
                spans.append(Span(start, end, closing_end, supervised, base, True, len(lead.encode()), num_bytes))
            base += num_bytes + 2
        return Rendered(text, tuple(spans), base, framed=False)

    def _apply(self, turns: Sequence[tuple[str, str]]) -> str:
        return self._template.render([{"role": role, "content": content} for role, content in turns])

    def _learn_pieces(self, roles: tuple[str, ...], shown: tuple[int, ...]) -> tuple[list[str], list[int]]:
        """The template's literal pieces around the contents of the messages `shown` (the others are empty), and the
        order in which it writes those contents."""
        if (roles, shown) not in self._pieces:
            turns = [(role, f"\ue000{i}\ue001" if i in shown else "") for i, role in enumerate(roles)]
            parts = _PLACEHOLDER.split(self._apply(turns))
            order = [int(part) for part in parts[1::2]]
            for i in shown:
                if order.count(i) != 1:
                    what = "drops" if i not in order else "repeats"
                    raise BadRow(
                        f"template {what} content",
                        f"the chat template {what} the content of message {i} ({roles[i]}), "
                        "so what is supervised cannot be told",
                    )
            self._pieces[(roles, shown)] = parts[0::2], order
        return self._pieces[(roles, shown)]

    def _learn_closing(self) -> str:
        reason = ""
        for roles in (("user", "assistant"), ("system", "user", "assistant")):
            try:
                literals, order = self._learn_pieces(roles, tuple(range(len(roles))))
            except BadRow as error:
                reason = reason or error.detail
                continue
            after = literals[-1] if order[-1] == len(roles) - 1 else ""
            tokens = [token for token in self._tokenizer.added_tokens if token.strip()]
            found = re.search("|".join(map(re.escape, tokens)), after) if tokens else None
            return after[: found.end()] if found else after.rstrip()
        raise UserError(f"{self._tokenizer.source}: cannot use its chat template: {reason}")


def _place(text: str, literals: Sequence[str], contents: Sequence[str]) -> list[tuple[int, int]] | None:
    """The range of each content in `text` = literals[0] + content[0] + literals[1] + ..., where a content may have
    lost outer white space; None if `text` is not of that form. Contents kept whole are preferred."""
    if not text.startswith(literals[0]):
        return None
    # Positions reachable after each content and its literal, with the ranges that led there.
    reached: dict[int, list[tuple[int, int]]] = {len(literals[0]): []}
    for content, literal in zip(contents, literals[1:], strict=True):
        following: dict[int, list[tuple[int, int]]] = {}
        for position, path in reached.items():
            for form in dict.fromkeys((content, content.strip(), content.rstrip(), content.lstrip())):
                if text.startswith(form + literal, position):
                    end = position + len(form)
                    following.setdefault(end + len(literal), path + [(position, end)])
        reached = following
    return reached.get(len(text))
