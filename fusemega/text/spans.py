"""Finds the texts of a conversation in its rendering: exactly, or the row is refused.

First rule. The same conversation is rendered with placeholders in place of the texts. That gives the template's literal
pieces. The real rendering must consist of exactly these pieces, with the texts (or the texts stripped of outer white
space) between them.

Some templates look into contents. Qwen3's takes reasoning out of `<think>...</think>` and drops it from turns before
the last question. Such a template can only look for strings in its own source. So if whole contents do not fit, they
are cut at the tags that the template's source contains: the tags stay, and each text between them is placed as before.

Second rule, for templates that look for something else. Two renderings are prefixes of the real one: the messages
before a turn with the generation prompt, and the messages up to and including the turn. The turn lies between their
ends. A text that occurs there exactly once is found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fusemega.text.document import Message
from fusemega.text.fields import REASONING, BadRow

# U+E000 and U+E001 are for private use: they have no meaning in ordinary text.
_PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")
_TAG = re.compile(r"</?[\w|.:-]{1,40}>|\[/?[A-Z][A-Z_]{1,40}\]")


@dataclass(frozen=True)
class Cell:
    """A text of a message that the template places as a whole.

    Attributes:
        message: number of its message.
        text: as given.
        offset: bytes of the message's stream between its header and this text.
        is_reasoning: whether a template may leave it out of turns before the last question.
    """

    message: int
    text: str
    offset: int
    is_reasoning: bool = False


@dataclass(frozen=True)
class Placed:
    """Where a cell lies: characters [start, end) of the rendering; `lead`: characters that the template took from the
    text's beginning, None where it wrote the text in JSON's spelling."""

    cell: Cell
    start: int
    end: int
    lead: int | None

    @classmethod
    def of(cls, cell: Cell, start: int, end: int, rendering: str) -> Placed:
        """The cell that is written at `rendering[start:end]` in one of the forms in which `place` finds it."""
        return cls(cell, start, end, dict(_forms(cell.text))[rendering[start:end]] if start < end else 0)


def given(message: Message) -> dict[str, Any]:
    """The message as templates get it."""
    reasoning = {REASONING[0]: message.reasoning} if message.reasoning else {}
    return {"role": message.role, "content": message.content} | reasoning | dict(message.fields)


class Outline:
    """The cells of a conversation, and the conversation with placeholders for them.

    Attributes:
        cells: in the order of the canonical stream.
    """

    def __init__(self, messages: Sequence[Message], tags: Collection[str] = ()) -> None:
        self.messages = messages
        self.cells: list[Cell] = []
        self._contents: list[list[int | str]] = []
        self._reasonings: list[int | None] = []
        cut = re.compile("(" + "|".join(map(re.escape, sorted(tags, key=len, reverse=True))) + ")") if tags else None
        for i, message in enumerate(messages):
            self._reasonings.append(self._add(Cell(i, message.reasoning, 0, True)) if message.reasoning else None)
            pieces = cut.split(message.content) if cut else [message.content]
            if len(pieces) == 1:
                self._contents.append([self._add(Cell(i, message.content, message.content_offset))])
                continue
            parts: list[int | str] = []
            offset = message.content_offset
            for n, piece in enumerate(pieces):  # texts at even places, tags at odd ones
                # What an assistant writes before the last tag may be reasoning.
                before = message.role == "assistant" and n < len(pieces) - 1
                parts.append(self._add(Cell(i, piece, offset, before)) if n % 2 == 0 and piece.strip() else piece)
                offset += len(piece.encode())
            self._contents.append(parts)

    def _add(self, cell: Cell) -> int:
        self.cells.append(cell)
        return len(self.cells) - 1

    @property
    def choices(self) -> list[tuple[int, ...]]:
        """Which cells to show, in the order to try. Templates with `if content` leave out a block whose content is
        empty: there, an empty content is literal."""
        everything = tuple(range(len(self.cells)))
        filled = []
        for i, cell in enumerate(self.cells):
            message = self.messages[cell.message]
            if cell.text.strip() or (message.supervised and not message.fields and not message.reasoning):
                filled.append(i)
        return list(dict.fromkeys((everything, tuple(filled))))

    def shown(self, cells: Collection[int], count: int | None = None) -> list[dict[str, Any]]:
        """The first `count` messages with placeholders for `cells`; the text of others is left out."""
        conversation = []
        for message, parts, reasoning in zip(self.messages, self._contents, self._reasonings, strict=True):
            texts = [part if isinstance(part, str) else _placeholder(part, cells) for part in parts]
            fields = given(message) | {"content": "".join(texts)}
            if reasoning is not None:
                fields[REASONING[0]] = _placeholder(reasoning, cells)
            conversation.append(fields)
        return conversation[:count]

    def pieces(self, rendering: str, shown: Collection[int]) -> tuple[list[str], list[int]]:
        """The literals around the cells in a rendering of `shown`, and their order; reasoning may be missing.

        Raises:
            BadRow: the template drops a content, or repeats one.
        """
        parts = _PLACEHOLDER.split(rendering)
        order = [int(part) for part in parts[1::2]]
        for i in shown:
            times, cell = order.count(i), self.cells[i]
            if times != 1 and not (times == 0 and cell.is_reasoning):
                what = "drops" if times == 0 else "repeats"
                raise BadRow(
                    f"template {what} content",
                    f"the chat template {what} the {'reasoning' if cell.is_reasoning else 'content'} of message "
                    f"{cell.message} ({self.messages[cell.message].role}), so the supervised tokens are unknown",
                )
        return parts[0::2], order


def tags_in(template: str) -> frozenset[str]:
    """Tags in the template's source, at which contents are cut."""
    return frozenset(_TAG.findall(template))


def place(text: str, literals: Sequence[str], contents: Sequence[str]) -> list[tuple[int, int]] | None:
    """The range of each content in `text` = literals[0] + content[0] + literals[1] + ..., where a content may have
    lost outer white space; None if `text` is not of that form. Contents kept whole are preferred."""
    if not text.startswith(literals[0]):
        return None
    # Positions reachable after each content and its literal, with the ranges that led there.
    reached: dict[int, list[tuple[int, int]]] = {len(literals[0]): []}
    for content, literal in zip(contents, literals[1:], strict=True):
        following: dict[int, list[tuple[int, int]]] = {}
        for position, path in reached.items():
            for form, _ in _forms(content):
                if text.startswith(form + literal, position):
                    end = position + len(form)
                    following.setdefault(end + len(literal), path + [(position, end)])
        reached = following
    return reached.get(len(text))


def find_between(
    text: str, messages: Sequence[Message], render: Callable[[int, bool], str]
) -> tuple[list[Placed], dict[int, tuple[int, int]]]:
    """The second rule, for the supervised turns alone.

    Args:
        text: the whole rendering.
        render: (number of messages, whether with the generation prompt) -> their rendering.

    Returns:
        The cells of these turns; and for each turn, where the model's text begins and where the turn ends.

    Raises:
        BadRow: something does not occur exactly once, or a rendering does not begin the whole one.
    """
    found, turns = [], {}
    for i, message in enumerate(messages):
        if message.content.strip() not in text:
            raise _rewritten(f"message {i} ({message.role}) is not in it unchanged")
        if not message.supervised:
            continue
        before = render(i, True) if i else ""
        upto = text if i == len(messages) - 1 else render(i + 1, False)
        if not before or not text.startswith(before):
            raise _rewritten(f"the generation prompt before message {i} does not begin the whole conversation")
        if not text.startswith(upto) or len(upto) < len(before):
            raise _rewritten(f"message {i} is written otherwise when others follow")
        at = len(before)
        for cell in Outline([message]).cells:
            form = cell.text.strip()
            if not form and (message.fields or message.reasoning):
                continue
            times = _count(form, upto[len(before) :]) if form else 0
            if times != 1:
                what = "reasoning" if cell.is_reasoning else "content"
                raise _rewritten(f"the {what} of message {i} occurs {times} times in its turn")
            start = upto.index(form, len(before))
            if start < at:
                raise _rewritten(f"the content of message {i} stands before its reasoning")
            at = start + len(form)
            found.append(Placed.of(replace(cell, message=i), start, at, text))
        turns[i] = (len(before), len(upto))
    return found, turns


def _rewritten(why: str) -> BadRow:
    return BadRow(
        "template rewrites content",
        "the chat template does not reproduce the messages' contents as they are (it rewrites, moves or drops part of "
        f"one: {why}), so the supervised tokens are unknown (data.chat_template sets another template)",
    )


def _placeholder(cell: int, shown: Collection[int]) -> str:
    return f"\ue000{cell}\ue001" if cell in shown else ""


def _forms(text: str) -> list[tuple[str, int | None]]:
    """The forms in which a template may write a text, the given one first; each with the number of characters taken
    from its beginning, or None for JSON's spelling."""
    lead = len(text) - len(text.lstrip())
    lines = len(text) - len(text.lstrip("\n"))
    forms: dict[str, int | None] = {text: 0}
    for form, taken in (
        (text.strip(), lead),
        (text.rstrip(), 0),
        (text.lstrip(), lead),
        (text.strip("\n"), lines),
        (text.rstrip("\n"), 0),
        (text.lstrip("\n"), lines),
        (json.dumps(text, ensure_ascii=False)[1:-1], None),
    ):
        forms.setdefault(form, taken)
    return list(forms.items())


def _count(needle: str, text: str) -> int:
    """Occurrences, overlapping ones too."""
    return sum(text.startswith(needle, i) for i in range(len(text))) if needle in text else 0
