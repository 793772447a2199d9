"""Task `gsm8k`: the number that a maths answer ends with, exactly.

For GSM8K (`#### 42` ends its answers), ASDiv (`42 apples`), and any other rows of question and answer.

* `exact_match_strict`: the number after the last `####` of the response is the right one.
* `exact_match_flexible`: the last number of the response is.

Numbers are equal if their values are: 0.5 and 1/2, 1,000 and 1000.0 (`numbers.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from statistics import fmean
from typing import Any, Literal

from pydantic import Field, field_validator

from fusemega.sampling.engine import LENGTH
from fusemega.tasks.numbers import numbers_in
from fusemega.tasks.task import (
    AnsweredBy,
    AnswerSettings,
    AnswerTask,
    Judged,
    Message,
    TaskItem,
    mean_and_error,
    register,
)
from fusemega.text.fields import BadRow, string

_MARK = "####"


class GSM8KSettings(AnswerSettings):
    """Rows with `question` and `answer`."""

    name: Literal["gsm8k"] = "gsm8k"
    question: str = Field("question", description="the rows' field with the question")
    answer: str = Field(
        "answer", description="the field with the right answer; its number counts, after #### if there is one"
    )
    template: str = Field(
        '{question}\n\nThink step by step. End with a line that has "#### " and the answer as a number.',
        description="the user's message; {question} stands for the question",
    )

    @field_validator("template")
    @classmethod
    def _asks(cls, value: str) -> str:
        if "{question}" not in value:
            raise ValueError("has no {question}")
        return value


@register("gsm8k")
class GSM8K(AnswerTask):
    """See the module."""

    Settings = GSM8KSettings
    settings: GSM8KSettings

    def __init__(self, settings: GSM8KSettings) -> None:
        super().__init__(settings)
        self.required = (settings.question, settings.answer)
        self.optional = ("id", "domain")

    def messages(self, row: Mapping[str, Any]) -> list[Message]:
        """See `AnswerTask.messages`."""
        self._right(row)
        question = string(row[self.settings.question], self.settings.question)
        return [{"role": "user", "content": self.settings.template.replace("{question}", question.strip())}]

    def judge(self, items: Sequence[TaskItem], by: AnsweredBy) -> Judged:
        """See `AnswerTask.judge`."""
        counts: Counter[str] = Counter(rows=len(items), judged=0, no_mark=0, no_number=0, cut=0, refused=0)
        rows: list[dict[str, Any]] = []
        means: dict[str, list[float]] = {"strict": [], "flexible": []}
        for item in items:
            right = self._right(item.row)
            found: list[dict[str, bool]] = []
            for answer in item.answers:
                told = {"row": item.place, "sample": answer.sample, "right": str(right), "text": answer.text}
                if answer.refused:
                    counts["refused"] += 1
                    rows.append({**told, "strict": None, "flexible": None})
                    continue
                strict, flexible = after_mark(answer.text), last_number(answer.text)
                counts.update(
                    judged=1, no_mark=strict is None, no_number=flexible is None, cut=answer.finish_reason == LENGTH
                )
                found.append({"strict": strict == right, "flexible": flexible == right})
                said = {"strict_number": _shown(strict), "flexible_number": _shown(flexible)}
                rows.append({**told, **said, **found[-1]})
            if found:
                for name, values in means.items():
                    values.append(fmean(each[name] for each in found))
        figures: dict[str, float | None] = {}
        for name, values in means.items():
            figures |= mean_and_error(f"exact_match_{name}", values)
        return Judged(figures, dict(counts), rows)

    def _right(self, row: Mapping[str, Any]) -> Fraction:
        given = row[self.settings.answer]
        text = (
            str(given) if isinstance(given, (int, float)) and not isinstance(given, bool) else string(given, "answer")
        )
        if _MARK in text:
            found = numbers_in(text.rpartition(_MARK)[2])[:1]
        else:
            found = numbers_in(text)
        if len(found) != 1:
            raise BadRow(
                "no number to compare",
                f"{self.settings.answer} has {len(found)} numbers ({text[:60]!r}); allowed: one, or one after {_MARK}",
            )
        return found[0]


def after_mark(text: str) -> Fraction | None:
    """The number after the last `####`; None: there is no mark, or something else than a number after it.

    >>> after_mark("6 + 3 = 9 #### 9 apples"), after_mark("9")
    (Fraction(9, 1), None)
    """
    _, mark, rest = text.rpartition(_MARK)
    line = rest.strip().partition("\n")[0]
    found = numbers_in(line) if mark else []
    return found[0] if found else None


def last_number(text: str) -> Fraction | None:
    """The last number of a text; None if it has none."""
    found = numbers_in(text)
    return found[-1] if found else None


def _shown(number: Fraction | None) -> str | None:
    return None if number is None else str(number)
