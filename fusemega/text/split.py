"""Splits long documents into parts that each fit in one window of several tokenizers, without losing anything.

Teachers and the target read a document with their own tokenizers and templates. If it fits in one window of each, they
share its sample. If it is longer, their windows end at different places and they share nothing. FuseChat's data was
split at 2,048 tokens beforehand; FuseLLM's at 2,048 - 48, under the longest of all its tokenizers.

A document is a list of units. A unit of a conversation is the messages up to and including an assistant's turn; each
part also begins with the conversation's system messages. A unit of a text is a word with the white space around it (in
Chinese and Japanese, the text up to a full stop); parts end at the end of a line if one is near. Other rows (prompt +
completion) are one unit.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from fusemega.errors import UserError
from fusemega.text.chat import ChatRenderer
from fusemega.text.data import Source
from fusemega.text.document import BadRow, Chat, Document, parse
from fusemega.text.fields import FLAGS
from fusemega.text.templates import OverBudget
from fusemega.text.tokenizer import Tokenizer

_BATCH = 512  # rows tokenized together
_WORD = re.compile(r"\s*(?:[^\s。！？]*[。！？]+|\S+)\n*")
_RowValue = dict[str, Any]


@dataclass(frozen=True)
class _Units:
    """What a row can be cut into.

    Attributes:
        count: number of units.
        part: (i, j) -> the row that has the units [i, j).
        line_ends: whether each unit ends a line.
    """

    count: int
    part: Callable[[int, int], _RowValue]
    line_ends: list[bool]


class Splitter:
    """Cuts rows of data so that each fits in `max_tokens` of every tokenizer, under its template, bos and eos included.

    Attributes:
        counts: rows read ("rows"), passed on unchanged ("whole"), cut ("cut"); parts written ("parts"), whole rows
            included; units left out because one alone is too long ("too long").
    """

    def __init__(self, tokenizers: Sequence[Tokenizer], max_tokens: int, on_long: Literal["error", "skip"]) -> None:
        self._tokenizers = tokenizers
        self._max_tokens = max_tokens
        self._on_long = on_long
        self._renderers: list[ChatRenderer] = []
        self.counts = {"rows": 0, "whole": 0, "cut": 0, "parts": 0, "too long": 0}

    def __call__(self, source: Source, advance: Callable[[int], None] = lambda rows: None) -> Iterator[_RowValue]:
        """The parts of all rows, in order.

        Args:
            advance: called with the number of rows that have just been done.

        Raises:
            UserError: an unusable row, or (under `on_long` "error") one that cannot be cut short enough.
        """
        rows = source.rows()
        while batch := list(islice(rows, _BATCH)):
            places = [f"{source.names[row.file]}:{row.number}" for row in batch]
            values = [_checked(row.value, place) for row, place in zip(batch, places, strict=True)]
            for value, place, lengths in zip(values, places, self._lengths(values, places), strict=True):
                whole = max(lengths) <= self._max_tokens
                parts = [value] if whole else list(self._parts(value, place))
                self.counts["rows"] += 1
                self.counts["whole" if whole else "cut"] += 1
                self.counts["parts"] += len(parts)
                yield from parts
            advance(len(batch))

    def _parts(self, value: _RowValue, place: str) -> Iterator[_RowValue]:
        """The longest parts that fit, from the beginning on."""
        units = _units(value)

        def fits(i: int, j: int) -> bool:
            return max(self._lengths([units.part(i, j)], [place])[0]) <= self._max_tokens

        begin, step = 0, 1
        while begin < units.count:
            if not fits(begin, begin + 1):
                self._refuse(units.part(begin, begin + 1), place)
                begin += 1
                continue
            end = _longest(begin, units.count, step, fits)
            step = max(1, (end - begin) // 2)  # the next part is much like this one
            if end < units.count:
                near = range(end, begin + (end - begin) // 2, -1)
                end = next((j for j in near if units.line_ends[j - 1] and fits(begin, j)), end)
            yield units.part(begin, end)
            begin = end

    def _lengths(self, values: Sequence[_RowValue], places: Sequence[str]) -> list[list[int]]:
        """How many tokens each row's sample has, for each tokenizer."""
        documents = [_parsed(value) for value in values]
        columns = []
        for index, tokenizer in enumerate(self._tokenizers):
            texts = [self._text(index, document, place) for document, place in zip(documents, places, strict=True)]
            frame = len(tokenizer.prefix_ids) + 1  # a text's bos, and its eos
            encodings = zip(tokenizer.encode(texts), documents, strict=True)
            columns.append([len(e.ids) + (0 if isinstance(document, Chat) else frame) for e, document in encodings])
        return [list(row) for row in zip(*columns, strict=True)]

    def _text(self, index: int, document: Document, place: str) -> str:
        if not isinstance(document, Chat):
            return document.text
        try:
            self._renderers = self._renderers or [ChatRenderer(tokenizer) for tokenizer in self._tokenizers]
            return self._renderers[index].render(document, Counter()).text
        except BadRow as error:
            raise UserError(f"{place}: {self._tokenizers[index].source}: {error.detail}") from None
        except OverBudget as error:
            raise UserError(f"{place}: {error}") from None

    def _refuse(self, value: _RowValue, place: str) -> None:
        self.counts["too long"] += 1
        if self._on_long == "error":
            lengths = self._lengths([value], [place])[0]
            worst = max(range(len(lengths)), key=lengths.__getitem__)
            begins = json.dumps(value["messages"][-1] if "messages" in value else value, ensure_ascii=False)[:60]
            raise UserError(
                f"{place}: a part that cannot be cut has {lengths[worst]} tokens of {self._tokenizers[worst].source}, "
                f"more than {self._max_tokens} ({begins}...); --on-long skip would count it and leave it out"
            )


def _longest(begin: int, count: int, step: int, fits: Callable[[int, int], bool]) -> int:
    """The largest end <= count for which the units [begin, end) fit, where the first unit is known to fit. Searches in
    growing steps, then by bisection."""
    good = begin + 1
    while good < count and fits(begin, min(good + step, count)):
        good, step = min(good + step, count), 2 * step
    bad = min(good + step, count + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(begin, middle) else (good, middle)
    return good


def _checked(value: Any, place: str) -> _RowValue:
    try:
        if isinstance(value, BadRow):
            raise value
        _parsed(value)
    except BadRow as error:
        raise UserError(f"{place}: {error.detail}") from None
    return value


def _parsed(value: Any) -> Document:
    """The row's document. Flags and other fields are ignored here: the parts keep them, and the training run that
    reads the parts decides."""
    if isinstance(value, dict):
        value = _unflagged(value)
        for key in ("messages", "prompt", "completion"):
            if isinstance(messages := value.get(key), (list, tuple)):
                value[key] = [_unflagged(message) if isinstance(message, dict) else message for message in messages]
    return parse(value, Counter())


def _unflagged(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: field for name, field in fields.items() if name not in FLAGS}


def _units(value: _RowValue) -> _Units:
    if value.get("messages") is not None:
        return _turns(value)
    if value.get("text") is None or (value.get("prompt") is not None and value.get("completion") is not None):
        return _Units(1, lambda i, j: value, [False])
    words = _WORD.findall(value["text"])
    words[-1] += value["text"][sum(map(len, words)) :]  # white space at the end
    return _Units(
        len(words), lambda i, j: value | {"text": "".join(words[i:j])}, [word.endswith("\n") for word in words]
    )


def _turns(value: _RowValue) -> _Units:
    messages = value["messages"]
    # A prompt repeats the first question, which only the first part has.
    value = {key: field for key, field in value.items() if key != "prompt"}
    first = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    system, units = messages[:first], [[]]  # type: tuple[list[Any], list[list[Any]]]
    for message in messages[first:]:
        if units[-1] and units[-1][-1]["role"] == "assistant" != message["role"]:
            units.append([])
        units[-1].append(message)
    if units[-1][-1]["role"] != "assistant":  # a question without an answer is not a part
        units[-2:] = [units[-2] + units[-1]]
    return _Units(
        len(units), lambda i, j: value | {"messages": system + [m for u in units[i:j] for m in u]}, [False] * len(units)
    )
