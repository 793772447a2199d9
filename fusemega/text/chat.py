"""Renders a document to the one string that is tokenized, and finds each message's content in it.

A conversation is rendered by the chat template; `spans.py` finds the texts in the rendering. The targets of an
assistant's turn are its content and its closing token. If the turn has reasoning or tool calls, the targets are
everything that the model has to write: from the end of the generation prompt to the closing token, tags included.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fusemega.errors import UserError
from fusemega.text.document import Chat, Message, Text
from fusemega.text.fields import CALLS, REASONING, BadRow
from fusemega.text.spans import Cell, Outline, Placed, find_between, given, place, tags_in
from fusemega.text.templates import ChatTemplate
from fusemega.text.tokenizer import Tokenizer

DROPPED = "turns not trained on: the template drops their reasoning if others follow"


@dataclass(frozen=True)
class Span:
    """One message inside the rendered text; positions in characters unless said otherwise.

    Attributes:
        start, end: the content.
        closing_end: end of the turn's closing token; equal to `end` where the template has none there.
        supervised: range of targets: a token is a target iff it *ends* in (supervised[0], supervised[1]]; or None.
        base: byte of the canonical stream at which the message begins.
        has_header: whether the canonical stream has its virtual header byte (conversations do, texts do not).
        stripped_bytes: UTF-8 bytes that the template removed from the content's beginning.
        num_bytes: UTF-8 bytes of the whole message in the canonical stream, between header and end of turn.
        offset: how many of these bytes lie before this text: a message may be several texts, with the template's own
            text between them.
        is_open: whether text that only this template writes follows, so that the end is no comparable place.
        is_spelt: whether the characters are the text's own, and not its spelling in JSON.
    """

    start: int
    end: int
    closing_end: int
    supervised: tuple[int, int] | None
    base: int
    has_header: bool
    stripped_bytes: int
    num_bytes: int
    offset: int = 0
    is_open: bool = False
    is_spelt: bool = True


@dataclass(frozen=True)
class Turn:
    """A turn in which the model writes more than a content. Targets are the tokens that end in (start, end].

    Attributes:
        start, end: characters of the rendered text.
        closing: byte of the canonical stream at which the closing token ends; None where nothing closes the turn.
        texts: ranges of characters whose bytes count as target bytes.
    """

    start: int
    end: int
    closing: int | None
    texts: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Rendered:
    """The text to tokenize, its spans, and the length in bytes of the canonical stream.

    `framed`: a plain text, which gets the tokenizer's prefix (bos) before it and eos, supervised, after it.
    """

    text: str
    spans: tuple[Span, ...]
    stream_length: int
    framed: bool
    turns: tuple[Turn, ...] = ()


def render_text(document: Text) -> Rendered:
    """A text, unchanged: one message without header byte; its eos ends at its length + 1."""
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
        self._template = ChatTemplate(template, tokenizer, tokenizer.template_source)
        specials = [text for i in tokenizer.special_ids if (text := tokenizer.token(i)).strip()]
        self._tags = tags_in(template).difference(specials)  # no content may spell those
        self._special = re.compile("|".join(map(re.escape, specials)) or "(?!)")
        self._tokenizer = tokenizer
        self._pieces: dict[tuple[tuple[str, ...], tuple[int, ...]], tuple[list[str], list[int]]] = {}
        self._heeded: set[str] = set()  # fields that the template was seen to use
        self.counts: Counter[str] = Counter()
        self.closing = self._learn_closing()

    def render(self, chat: Chat, ignored: Counter[str] | None = None) -> Rendered:
        """The conversation's text and a span for each message, in their order (none for an empty content that the
        template leaves out with its block).

        Args:
            ignored: counts fields that the template was given and does not write, by name; None: they are refused.

        Raises:
            BadRow: the template refuses the conversation, drops, repeats or rewrites a content, or ignores
                something that it was given.
            OverBudget: it needs more time, memory or output than a conversation may.
        """
        text = self._apply([given(message) for message in chat.messages], chat.settings)
        self._refuse_special_tokens(chat, contents=False)
        self._check_heeded(chat, text, ignored)
        placed, missing = self._place(chat, text)
        if placed is not None:
            chat = self._without_dropped(chat, missing)
            return self._spans(text, chat, placed)
        self._refuse_special_tokens(chat, contents=True)
        found, turns = find_between(text, chat.messages, lambda count, ask: self._first(chat, count, ask))
        return self._spans(text, chat, found, turns)

    def _place(self, chat: Chat, text: str) -> tuple[list[Placed] | None, list[Cell]]:
        """Where the cells lie by the first rule, or None if it does not apply; and the cells of reasoning that the
        template left out."""
        messages = chat.messages
        whole = Outline(messages)
        cut = Outline(messages, self._tags)
        for outline in (whole, cut) if len(cut.cells) > len(whole.cells) else (whole,):
            for shown in outline.choices:
                literals, order = self._learn_pieces(chat, outline, shown)
                ranges = place(text, literals, [outline.cells[i].text for i in order])
                if ranges is None:
                    continue
                pairs = zip(order, ranges, strict=True)
                placed = [Placed.of(outline.cells[i], start, end, text) for i, (start, end) in pairs]
                if not any(each.lead is None and messages[each.cell.message].supervised for each in placed):
                    missing = [outline.cells[i] for i in shown if i not in order]
                    return placed, missing
        return None, []

    def _without_dropped(self, chat: Chat, missing: list[Cell]) -> Chat:
        """The conversation in which turns are only context if the template leaves out their reasoning once others
        follow: the model would not write them so."""
        turns = {cell.message for cell in missing if chat.messages[cell.message].supervised}
        for i in sorted(turns):
            outline = Outline(chat.messages[: i + 1], self._tags)
            shown = tuple(range(len(outline.cells)))
            order = outline.pieces(self._apply(outline.shown(shown), chat.settings), shown)[1]
            if any(outline.cells[k].is_reasoning and k not in order and outline.cells[k].message == i for k in shown):
                raise BadRow(
                    "template drops reasoning",
                    f"the chat template does not write the reasoning of message {i} ({chat.messages[i].role}); "
                    "set another template with data.chat_template",
                )
        if not turns:
            return chat
        messages = [replace(m, supervised=m.supervised and i not in turns) for i, m in enumerate(chat.messages)]
        if not any(message.supervised for message in messages):
            raise BadRow(
                "template drops reasoning",
                "the chat template drops the reasoning of every turn that is to be trained on, because others follow; "
                "set another template with data.chat_template",
            )
        self.counts[DROPPED] += len(turns)
        return replace(chat, messages=tuple(messages))

    def _spans(
        self,
        text: str,
        chat: Chat,
        placed: list[Placed],
        between: Mapping[int, tuple[int, int]] | None = None,
    ) -> Rendered:
        spans, turns, base = [], [], 0
        for i, message in enumerate(chat.messages):
            mine = [each for each in placed if each.cell.message == i]
            num_bytes = message.stream_length - 2  # without header and end of turn
            ends = mine[-1].end if mine else None
            closes = ends is not None and text.startswith(self.closing, ends)
            whole = len(mine) == 1 and mine[0].cell.text == message.content and between is None
            # With more than a plain content, a turn's targets are a range of its own, and its spans have none.
            is_turn = message.supervised and not (whole and not message.reasoning and not _calls(message))
            for each in mine:
                last = each is mine[-1] and closes
                closing_end = each.end + len(self.closing) if last else each.end
                supervised = (each.start, closing_end) if message.supervised and not is_turn else None
                lead = len(each.cell.text[: each.lead or 0].encode())
                is_open = not (whole or last)
                spans.append(
                    Span(
                        *(each.start, each.end, closing_end, supervised, base, True, lead, num_bytes),
                        *(each.cell.offset, is_open, each.lead is not None),
                    )
                )
            if is_turn:
                following = [each.start for each in placed if each.cell.message > i]
                limits = (between or {}).get(i) or (
                    self._begins(chat, i, text, mine),
                    min(following, default=len(text)),
                )
                turns.append(self._turn(text, message, i, mine, limits, base))
            base += num_bytes + 2
        return Rendered(text, tuple(spans), base, framed=False, turns=tuple(turns))

    def _turn(
        self, text: str, message: Message, i: int, mine: Sequence[Placed], limits: tuple[int, int], base: int
    ) -> Turn:
        start, limit = limits
        content_end = max([start, *(each.end for each in mine)])
        times = text.count(self.closing, content_end, limit) if self.closing else 0
        calls = _calls(message)
        # The last text of a turn ends at the closing token; after tool calls only that token shows where.
        if calls and times != 1 or times > 1 and not text.startswith(self.closing, content_end):
            raise BadRow(
                "template rewrites content",
                f"the end of message {i} is unknown: its closing {self.closing!r} follows it {times} times",
            )
        end = text.index(self.closing, content_end, limit) + len(self.closing) if times else content_end
        if any(name not in text[start:end] for name in calls):
            raise BadRow("template drops tool calls", f"the chat template does not write the calls of message {i}")
        texts = [(each.start, each.end) for each in mine]
        if calls:
            texts.append((content_end, end - len(self.closing)))
        return Turn(start, end, base + message.stream_length if times else None, tuple(texts))

    def _begins(self, chat: Chat, i: int, text: str, mine: Sequence[Placed]) -> int:
        """Where the text that the model writes in message `i` begins: after the generation prompt."""
        first = min((each.start for each in mine), default=len(text))
        try:
            prompt = self._first(chat, i, True) if i else ""
        except BadRow:
            prompt = ""
        if prompt and text.startswith(prompt) and len(prompt) <= first:
            return len(prompt)
        if not mine:
            raise BadRow(
                "template rewrites content",
                f"the beginning of message {i} is unknown: the generation prompt does not begin the conversation",
            )
        return first

    def _first(self, chat: Chat, count: int, ask: bool) -> str:
        """The rendering of the first messages; `ask`: with the generation prompt."""
        return self._apply([given(message) for message in chat.messages[:count]], chat.settings, ask)

    def _apply(self, messages: list[dict[str, Any]], settings: Mapping[str, Any], ask: bool = False) -> str:
        return self._template.render(messages, add_generation_prompt=ask, **settings)

    def _check_heeded(self, chat: Chat, text: str, ignored: Counter[str] | None) -> None:
        """Refuses or counts fields that the template ignores."""
        messages = [given(message) for message in chat.messages]
        asked: str | None = None
        for name, value in chat.settings.items():
            if name in self._heeded:
                continue
            asked = asked or self._apply(messages, chat.settings, True)
            rest = {key: kept for key, kept in chat.settings.items() if key != name}
            # A template's setting may be at its default value: then try another value.
            others = [rest, *([rest | {name: other}] if (other := _another(value)) is not None else [])]
            if any(self._differs(messages, settings, text, asked) for settings in others):
                self._heeded.add(name)
            else:
                _not_heeded(name, "the row", ignored)
        for name in (*CALLS, "name"):
            # A tool's name identifies the call: most templates match calls and results by order.
            holders = [i for i, m in enumerate(messages) if m.get(name) and (name != "name" or m["role"] != "tool")]
            if not holders or name in self._heeded:
                continue
            without = [{key: kept for key, kept in m.items() if key != name} for m in messages]
            for i, message in enumerate(without):
                message |= {"name": messages[i]["name"]} if i not in holders and "name" in messages[i] else {}
            if self._differs(without, chat.settings, text, None):
                self._heeded.add(name)
                continue
            learnt = name in CALLS and any(chat.messages[i].supervised for i in holders)
            _not_heeded(name, f"message {holders[0]}", None if learnt else ignored)
        if any(m.reasoning and not m.supervised for m in chat.messages) and REASONING[0] not in self._heeded:
            without = [{key: kept for key, kept in m.items() if key != REASONING[0]} for m in messages]
            turn = next(i for i, m in enumerate(chat.messages) if m.reasoning)
            alone = self._first(chat, turn + 1, False)
            if self._differs(without, chat.settings, text, None) or self._differs(
                without[: turn + 1], chat.settings, alone, None
            ):
                self._heeded.add(REASONING[0])
            elif not any(m.reasoning and m.supervised for m in chat.messages):
                _not_heeded(REASONING[0], f"message {turn}", ignored)

    def _differs(
        self, messages: list[dict[str, Any]], settings: Mapping[str, Any], text: str, asked: str | None
    ) -> bool:
        """Whether these render otherwise than as `text`, or as `asked` with the generation prompt."""
        try:
            if self._apply(messages, settings) != text:
                return True
            return asked is not None and self._apply(messages, settings, True) != asked
        except BadRow:
            return True

    def _refuse_special_tokens(self, chat: Chat, contents: bool) -> None:
        """Refuses special tokens in what the template is given beside contents. With `contents`, refuses them there
        too: under the second rule, not every content has a span in which a special token would be found later."""
        spelled: list[tuple[str, Any]] = [("the row", chat.settings)]
        for i, message in enumerate(chat.messages):
            spelled.append((f"message {i}", [message.content if contents else "", message.reasoning, message.fields]))
        for where, value in spelled:
            if found := next((hit for text in _texts(value) if (hit := self._special.search(text))), None):
                raise BadRow(
                    "special token in content",
                    f"{where} spells the special token {found[0]!r}, which the tokenizer would read as that token",
                )

    def _learn_pieces(self, chat: Chat, outline: Outline, shown: tuple[int, ...]) -> tuple[list[str], list[int]]:
        """The template's literal pieces around the cells `shown`, and the order in which it writes those."""
        # Only then do the pieces depend on the roles alone, so that they can be kept.
        plain = (
            not chat.settings
            and all(not m.fields and not m.reasoning for m in chat.messages)
            and len(outline.cells) == len(chat.messages)
        )
        key = tuple(message.role for message in chat.messages), shown
        if plain and key in self._pieces:
            return self._pieces[key]
        found = outline.pieces(self._apply(outline.shown(shown), chat.settings), shown)
        if plain:
            self._pieces[key] = found
        return found

    def _learn_closing(self) -> str:
        reason = ""
        for roles in (("user", "assistant"), ("system", "user", "assistant")):
            chat = Chat(tuple(Message(role, "", role == "assistant") for role in roles))
            try:
                literals, order = self._learn_pieces(chat, Outline(chat.messages), tuple(range(len(roles))))
            except BadRow as error:
                reason = reason or error.detail
                continue
            after = literals[-1] if order[-1] == len(roles) - 1 else ""
            tokens = [token for token in self._tokenizer.added_tokens if token.strip()]
            found = re.search("|".join(map(re.escape, tokens)), after) if tokens else None
            return after[: found.end()] if found else after.rstrip()
        raise UserError(f"{self._template.source}: cannot use its chat template: {reason}")


def _calls(message: Message) -> list[str]:
    """Names of the functions that a message calls."""
    calls = list(message.fields.get("tool_calls", ()))
    if "function_call" in message.fields:
        calls.append(message.fields["function_call"])
    return [str(call.get("function", call)["name"]) for call in calls]


def _another(value: Any) -> Any:
    """A value that is not this one; None for lists and objects."""
    if isinstance(value, bool):
        return not value
    return value + "?" if isinstance(value, str) else value + 1 if isinstance(value, (int, float)) else None


def _not_heeded(name: str, where: str, ignored: Counter[str] | None) -> None:
    if ignored is None:
        raise BadRow(
            "template ignores field",
            f"{where} has {name}, which the chat template ignores; set another with data.chat_template "
            "(data.unknown_fields: ignore would leave out and count such fields, unless they are to be trained on)",
        )
    ignored[name] += 1


def _texts(value: Any) -> Iterator[str]:
    """Every text inside a value of JSON, names of fields too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(str(name))
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
