"""Reads groups: rows of a prompt and its responses with rewards, from any number of files.

A prompt may be in several rows and files, such as the sources' responses in one and the target's in another: its
responses are joined. Equal texts of one source are one response. What is read does not depend on the order of rows or
files: prompts are known by their key, and responses are sorted by source, sample and text.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import xxhash

from fusemega.errors import UserError, nearest
from fusemega.sampling.prompts import ABOUT, parse_prompt
from fusemega.selection.protocol import Candidate, CandidatePrompt
from fusemega.selection.texts import Texts
from fusemega.text.data import DataConfig, Source
from fusemega.text.fields import NAMES, BadRow, check_extras, kind, string

_OF_ROWS = ("responses", "rewards", "scores", "objectives")
_OF_RESPONSES = ("text", "messages", "source", "sample", "tokens", "reward", "score", "correct", "verdict")
_REWARDS = ("reward", "score")
_UNASKED, _UNKNOWN = -2, -1  # beside 0 and 1 in the column of verdicts: no `correct`, and null
_AGREE = ("domain", "answer", "tests", "entry_point")
_BLOCK = 4096  # prompts whose columns become Python values at once


@dataclass
class PromptRow:
    """What the rows say of one prompt.

    Attributes:
        messages: the prompt.
        about: what else: domain, answer, tests, entry_point, id, dataset; where rows of it differ in id or dataset,
            the smaller one.
        place: file and row of the first, for messages.
    """

    messages: Sequence[Mapping[str, Any]]
    about: dict[str, str]
    place: str

    @property
    def text(self) -> str:
        """What the user says in it."""
        return "\n".join(str(message["content"]) for message in self.messages if message["role"] == "user")


@dataclass
class ResponseTable:
    """All prompts and responses.

    Attributes:
        rows: key -> its prompt.
        texts: the responses' texts.
        files: names of the files.
        counts: rows read; responses; `joined_rows`, whose prompt an earlier row has; `equal_texts`, which were merged;
            `undecided`: responses with `correct: null`.
        sources: source -> its responses; sorted.
        unit: of lengths: tokens or characters.
    """

    rows: dict[str, PromptRow]
    texts: Texts
    files: list[str]
    counts: Counter[str]
    sources: dict[str, int]
    unit: str
    _columns: Mapping[str, np.ndarray] = field(repr=False)
    _names: Sequence[str] = field(repr=False)

    def prompts(self) -> Iterator[CandidatePrompt]:
        """Every prompt with its responses."""
        keys = list(self.rows)
        bounds = np.searchsorted(self._columns["prompt"], np.arange(len(keys) + 1)).tolist()
        for begin in range(0, len(keys), _BLOCK):
            end = min(begin + _BLOCK, len(keys))
            part = slice(bounds[begin], bounds[end])
            columns = [
                self._columns[name][part].tolist() for name in ("text", "source", "reward", "correct", "length", "same")
            ]
            responses = list(zip(*columns, strict=True))
            for key, (first, last) in zip(keys[begin:end], pairwise(bounds[begin : end + 1]), strict=True):
                found = responses[first - bounds[begin] : last - bounds[begin]]
                row = self.rows[key]
                yield CandidatePrompt(
                    key,
                    tuple(
                        Candidate(
                            text,
                            self._names[source],
                            None if math.isnan(reward) else reward,
                            bool(correct) if correct >= 0 else None,
                            length,
                            same,
                        )
                        for text, source, reward, correct, length, same in found
                    ),
                    row.about.get("domain", ""),
                    row.about.get("dataset", ""),
                    all(response[3] != _UNASKED for response in found),
                    row.place,
                )


def read_groups(
    paths: str | Sequence[str],
    texts: Texts,
    sources: Sequence[str] | None = None,
    ignored: Counter[str] | None = None,
    advance: Callable[[int], None] = lambda rows: None,
) -> ResponseTable:
    """Reads all files.

    Args:
        paths: as a run file's data.path.
        texts: an empty place for the responses' texts.
        sources: only responses of these; None: of all.
        ignored: counts unknown fields by name, which are left out; None: they are refused.
        advance: called with the number of rows that have just been read.

    Raises:
        UserError: an unusable row (its file and number); a prompt that rows describe differently; a source that no
            response has.
    """
    source = Source(DataConfig(path=paths if isinstance(paths, str) else list(paths)))
    reader = _Reader(texts, ignored)
    for row in source.rows():
        place = f"{source.names[row.file]}:{row.number}"
        try:
            reader.add(row.value, place)
        except BadRow as error:
            detail = error.detail.replace("data.unknown_fields", "unknown_fields")
            raise UserError(f"{place}: {detail}") from None
        advance(1)
    if not reader.prompt:
        raise UserError(f"{', '.join(source.names)}: no responses in {reader.counts['rows']} rows")
    return reader.table(source.names, sources)


class _Reader:
    """Columns of the responses read so far."""

    def __init__(self, texts: Texts, ignored: Counter[str] | None) -> None:
        self.rows: dict[str, PromptRow] = {}
        self.counts: Counter[str] = Counter(rows=0)
        self.prompt, self.source, self.sample = array("i"), array("i"), array("q")
        self.reward, self.correct, self.length, self.same = array("d"), array("b"), array("q"), array("Q")
        self._characters, self._by_tokens = array("q"), True
        self._texts, self._ignored = texts, ignored
        self._numbers: dict[str, int] = {}  # of prompts, by key
        self._sources: dict[str, int] = {}

    def add(self, value: object, place: str) -> None:
        if isinstance(value, BadRow):
            raise value
        if not isinstance(value, Mapping):
            raise BadRow("wrong type", f"a row is an object with prompt and responses, found {kind(value)}")
        row = {str(name): given for name, given in value.items() if given is not None}
        responses = row.get("responses")
        if not isinstance(responses, list) or not responses:
            raise BadRow("unknown shape", "the row has no responses; expected prompt with responses, a list")
        others = (*NAMES, *_OF_ROWS)
        plain = {name: given for name, given in row.items() if name in ABOUT or name not in others}
        prompt = parse_prompt(plain, self._ignored, place)
        self._join(prompt.key, PromptRow(prompt.messages, dict(prompt.about), place))
        rewards = _rewards(row, len(responses))
        number = self._numbers.setdefault(prompt.key, len(self._numbers))
        self.counts["rows"] += 1
        for i, response in enumerate(responses):
            self._response(number, response, f"responses[{i}]", rewards[i] if rewards else None)

    def _join(self, key: str, row: PromptRow) -> None:
        known = self.rows.setdefault(key, row)
        if known is row:
            return
        self.counts["joined_rows"] += 1
        for name in _AGREE:
            if row.about.get(name, known.about.get(name)) != known.about.get(name, row.about.get(name)):
                raise BadRow(
                    "prompts differ", f"the row's {name} is another than in {known.place}, which has its prompt"
                )
        for name, said in row.about.items():
            known.about[name] = min(said, known.about.get(name, said))

    def _response(self, number: int, response: object, key: str, reward: float | None) -> None:
        said: Mapping[str, Any] = response if isinstance(response, Mapping) else {"text": response}
        if said.keys() - _OF_RESPONSES:
            check_extras(said, _OF_RESPONSES, key, self._ignored)
        text = _text(said, key)
        source, sample, tokens, correct = (said.get(name) for name in ("source", "sample", "tokens", "correct"))
        own = [name for name in _REWARDS if said.get(name) is not None]
        if own and (len(own) > 1 or reward is not None):
            raise BadRow("unsupported field", f"{key} has more than one reward")
        if own:
            reward = _number(said[own[0]], f"{key}.{own[0]}")
        if correct is not None and not isinstance(correct, bool):
            raise BadRow("wrong type", f"{key}.correct is true, false or null, found {kind(correct)}")
        content = text.encode("utf-8")
        self.prompt.append(number)
        self.source.append(self._sources.setdefault(string(source or "", f"{key}.source"), len(self._sources)))
        self.sample.append(_count(sample, f"{key}.sample"))
        self.reward.append(math.nan if reward is None else reward)
        self.correct.append(_UNASKED if "correct" not in said else _UNKNOWN if correct is None else int(correct))
        self._by_tokens &= tokens is not None
        self.length.append(_count(tokens, f"{key}.tokens"))
        self._characters.append(len(text))
        self.same.append(xxhash.xxh3_64_intdigest(content))
        self._texts.add(content)

    def table(self, files: list[str], only: Sequence[str] | None) -> ResponseTable:
        names = list(self._sources)
        for name in only or ():
            if name not in names:
                raise UserError(
                    f"sources: no response has the source {name!r}{nearest(name, names)}; found: {', '.join(names)}"
                )
        columns: dict[str, np.ndarray] = {
            "prompt": np.asarray(self.prompt),
            "source": np.asarray(self.source),
            "reward": np.asarray(self.reward),
            "correct": np.asarray(self.correct),
            "length": np.asarray(self.length if self._by_tokens else self._characters),
            "same": np.asarray(self.same),
            "text": np.arange(len(self.prompt)),
        }
        places = {name: place for place, name in enumerate(sorted(names))}
        rank = np.array([places[name] for name in names])[columns["source"]]
        # Of equal texts, the one with a verdict and a reward, so that it does not matter which comes first.
        order = np.lexsort(
            (
                columns["reward"],
                -columns["correct"],
                columns["same"],
                np.asarray(self.sample),
                rank,
                columns["prompt"],
            )
        )
        if only is not None:
            taken = np.isin(columns["source"], [self._sources[name] for name in only])
            self.counts["of_other_sources"] += int((~taken).sum())
            order = order[taken[order]]
        by_text = order[
            np.lexsort((np.arange(len(order)), columns["same"][order], rank[order], columns["prompt"][order]))
        ]
        again = np.zeros(len(columns["prompt"]), dtype=bool)
        if len(by_text) > 1:
            later, earlier = by_text[1:], by_text[:-1]
            equal = np.ones(len(later), dtype=bool)
            for column in (columns["prompt"], columns["source"], columns["same"]):
                equal &= column[later] == column[earlier]
            again[later[equal]] = True
        order = order[~again[order]]
        self.counts["equal_texts"] += int(again.sum())
        columns = {name: column[order] for name, column in columns.items()}
        self.counts["responses"] = len(order)
        self.counts["undecided"] += int((columns["correct"] == _UNKNOWN).sum())
        of_each = np.bincount(columns["source"], minlength=len(names)).tolist()
        found = {names[i]: of_each[i] for i in sorted(range(len(names)), key=names.__getitem__) if of_each[i]}
        unit = "tokens" if self._by_tokens else "characters"
        return ResponseTable(self.rows, self._texts, files, self.counts, found, unit, columns, names)


def _text(said: Mapping[str, Any], key: str) -> str:
    """The response's text; of messages, their contents, which must be one assistant turn."""
    if said.get("messages") is None:
        return string(said.get("text"), f"{key}.text")
    messages = said["messages"]
    if not isinstance(messages, list) or len(messages) != 1 or not isinstance(messages[0], Mapping):
        raise BadRow("unsupported field", f"{key}.messages: allowed here: one turn of the assistant, or text")
    if messages[0].keys() != {"role", "content"} or messages[0]["role"] != "assistant":
        raise BadRow("unsupported field", f"{key}.messages: allowed here: role assistant and content, or text")
    return string(messages[0]["content"], f"{key}.messages[0].content")


def _rewards(row: Mapping[str, Any], count: int) -> list[float]:
    given = [name for name in ("rewards", "scores") if row.get(name)]
    if not given:
        return []
    values = row[given[0]]
    if len(given) > 1 or not isinstance(values, list) or len(values) != count:
        raise BadRow("wrong type", f"{given[0]} is a list of {count} numbers, one per response")
    return [_number(value, f"{given[0]}[{i}]") for i, value in enumerate(values)]


def _number(value: object, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadRow("wrong type", f"{key} is a finite number, found {str(value)[:40]!r}")
    return float(value)


def _count(value: object, key: str) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise BadRow("wrong type", f"{key} is an integer of at least 0, found {str(value)[:40]!r}")
    return value
