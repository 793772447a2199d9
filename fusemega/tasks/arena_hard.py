"""Task `arena_hard`: answers in the form of Arena-Hard-Auto (v2.0 and v0.1 as published since April 2025).

The folder `model_answer` of the task has `GENERATOR.jsonl`, to be copied to the tool's `data/BENCHMARK/model_answer`. A
line:

    {"uid", "ans_id", "model", "messages": [..., {"role": "assistant", "content": {"answer": text}}], "tstamp",
     "metadata": {"token_len", "header_count", "list_count", "bold_count"}}

The metadata are for style control. The tool counts `token_len` with gpt-4o's tokenizer; here it is the model's own
count, and where that is not known there is no `metadata`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

from fusemega.sampling.engine import LENGTH, SamplingSettings
from fusemega.tasks.task import (
    AnsweredBy,
    AnswerSettings,
    AnswerTask,
    Judged,
    Message,
    TaskAnswer,
    TaskItem,
    one_answer,
    register,
)
from fusemega.text.fields import string

_CODE = re.compile("```([^`]*)```")
_HEADER = re.compile(r"^(#{1,6})\s", re.MULTILINE)
_ORDERED, _UNORDERED = (re.compile(rf"^\s*{mark}\s", re.MULTILINE) for mark in (r"\d+\.", "[-*+]"))
_BOLD = {mark: re.compile(rf"{re.escape(mark)}[^{mark[0]}\n]+{re.escape(mark)}") for mark in ("**", "__")}


class ArenaHardSettings(AnswerSettings):
    """Rows of Arena-Hard's `question.jsonl`: `uid` and `prompt`."""

    name: Literal["arena_hard"] = "arena_hard"


@register("arena_hard")
class ArenaHard(AnswerTask):
    """See the module."""

    Settings = ArenaHardSettings
    required = ("uid", "prompt")
    optional = ("category", "subcategory", "cluster", "language")

    def check(self, sampling: SamplingSettings) -> None:
        """See `AnswerTask.check`."""
        one_answer(sampling)

    def messages(self, row: Mapping[str, Any]) -> list[Message]:
        """See `AnswerTask.messages`."""
        string(row["uid"], "uid")
        return [{"role": "user", "content": string(row["prompt"], "prompt")}]

    def judge(self, items: Sequence[TaskItem], by: AnsweredBy) -> Judged:
        """See `AnswerTask.judge`."""
        counts = Counter(rows=len(items), cut=0, empty=0, refused=0, no_metadata=0)
        lines, rows = [], []
        for item in items:
            (answer,) = item.answers
            counts.update(
                cut=answer.finish_reason == LENGTH,
                refused=answer.refused,
                empty=not answer.refused and not answer.text.strip(),
                no_metadata=answer.tokens is None,
            )
            lines.append(json.dumps(_line(item, answer, by), ensure_ascii=False) + "\n")
            rows.append({"row": item.place, "uid": item.row["uid"], "text": answer.text, "tokens": answer.tokens})
        figures = {"mean_characters": fmean(len(row["text"]) for row in rows)}
        return Judged({**figures}, dict(counts), rows, {f"model_answer/{by.generator}.jsonl": "".join(lines)})


def _line(item: TaskItem, answer: TaskAnswer, by: AnsweredBy) -> dict[str, Any]:
    known = f"{by.generator}\0{item.row['uid']}\0{answer.text}"
    found = {
        "uid": item.row["uid"],
        "ans_id": hashlib.blake2b(known.encode(), digest_size=11).hexdigest(),
        "model": by.generator,
        "messages": [*item.messages, {"role": "assistant", "content": {"answer": answer.text}}],
        "tstamp": by.time,
    }
    if answer.tokens is None:
        return found
    return {**found, "metadata": {"token_len": answer.tokens, **markdown_counts(answer.text)}}


def markdown_counts(text: str) -> dict[str, dict[str, int]]:
    """Headers, list items and bold passages outside blocks of code, as style control counts them.

    >>> markdown_counts("# A\\n- one\\n- **two**\\n1. three")["list_count"]
    {'ordered': 1, 'unordered': 2}
    """
    for block in _CODE.findall(text):
        text = text.replace(block, "")
    levels = Counter(len(marks) for marks in _HEADER.findall(text))
    return {
        "header_count": {f"h{level}": levels[level] for level in range(1, 7)},
        "list_count": {"ordered": len(_ORDERED.findall(text)), "unordered": len(_UNORDERED.findall(text))},
        "bold_count": {mark: len(pattern.findall(text)) for mark, pattern in _BOLD.items()},
    }
