"""Task `humaneval`: the share of programming problems that the model solves (Chen et al., arXiv:2107.03374).

A problem has n programs, of which c pass all tests. pass@k is the probability that one of k programs drawn from them
passes, 1 - C(n - c, k) / C(n, k), without bias; its mean over the problems. With n = k = 1 it is the share that passes.

Programs run in the sandbox of `fusemega verify`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal

from pydantic import Field, field_validator

from fusemega.errors import UserError
from fusemega.reward.code import CodeLimits, Program, check_code, code_verdicts
from fusemega.sampling.engine import LENGTH, SamplingSettings
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
from fusemega.text.fields import string


class HumanEvalSettings(AnswerSettings):
    """Rows of HumanEval: `task_id`, `prompt`, `entry_point`, `test`."""

    name: Literal["humaneval"] = "humaneval"
    k: list[int] = Field([1], min_length=1, description="the k of pass@k; at most sampling.n")
    template: str = Field(
        "Complete this Python code. Answer with all of it in one block.\n\n```python\n{prompt}\n```",
        description="the user's message; {prompt} stands for the problem",
    )
    code: CodeLimits = CodeLimits()
    workers: int = Field(1, ge=1, le=256, description="programs that run at the same time")

    @field_validator("template")
    @classmethod
    def _asks(cls, value: str) -> str:
        if "{prompt}" not in value:
            raise ValueError("has no {prompt}")
        return value

    @field_validator("k")
    @classmethod
    def _positive(cls, value: list[int]) -> list[int]:
        if min(value) < 1 or len(set(value)) < len(value):
            raise ValueError("expected different numbers of at least 1")
        return value


@register("humaneval")
class HumanEval(AnswerTask):
    """See the module."""

    Settings = HumanEvalSettings
    settings: HumanEvalSettings
    required = ("task_id", "prompt", "entry_point", "test")
    optional = ("canonical_solution",)

    def check(self, sampling: SamplingSettings) -> None:
        """See `AnswerTask.check`."""
        if max(self.settings.k) > sampling.n:
            raise UserError(
                f"k: pass@{max(self.settings.k)} needs as many answers to each problem, and sampling.n is "
                f"{sampling.n}; allowed: a larger sampling.n (with a temperature above 0), or a smaller k"
            )
        check_code([Program("", "")], self.settings.code)  # its error says that this machine has no sandbox

    def messages(self, row: Mapping[str, Any]) -> list[Message]:
        """See `AnswerTask.messages`."""
        for name in self.required:
            string(row[name], name)
        return [{"role": "user", "content": self.settings.template.replace("{prompt}", row["prompt"].strip())}]

    def judge(self, items: Sequence[TaskItem], by: AnsweredBy) -> Judged:
        """See `AnswerTask.judge`."""
        asked = [(item, answer) for item in items for answer in item.answers if not answer.refused]
        programs = [
            Program(answer.text, item.row["test"], item.row["entry_point"], item.row["prompt"])
            for item, answer in asked
        ]
        verdicts = dict(code_verdicts(programs, self.settings.code, self.settings.workers))
        counts: Counter[str] = Counter(rows=len(items), judged=0, undecided=0, cut=0, refused=0)
        counts["refused"] = sum(answer.refused for item in items for answer in item.answers)
        reasons: Counter[str] = Counter()
        rows: list[dict[str, Any]] = []
        passed: dict[int, list[bool]] = {}
        for i, (item, answer) in enumerate(asked):
            verdict = verdicts[i]
            told = {"row": item.place, "task_id": item.row["task_id"], "sample": answer.sample, "text": answer.text}
            rows.append({**told, "passed": verdict.correct, "reason": verdict.reason})
            counts["cut"] += answer.finish_reason == LENGTH
            if verdict.correct is None:
                counts["undecided"] += 1
                continue
            counts["judged"] += 1
            reasons[f"wrong: {verdict.reason}"] += not verdict.correct
            passed.setdefault(id(item), []).append(verdict.correct)
        figures: dict[str, float | None] = {}
        for k in sorted(self.settings.k):
            values = [pass_at_k(len(each), sum(each), k) for each in passed.values() if len(each) >= k]
            figures |= mean_and_error(f"pass@{k}", values)
            counts[f"problems of pass@{k}"] = len(values)
        return Judged(figures, {**counts, **{name: count for name, count in reasons.most_common() if count}}, rows)


def pass_at_k(n: int, c: int, k: int) -> float:
    """The probability that of k out of n programs, c of which pass, at least one does.

    >>> pass_at_k(5, 1, 1), pass_at_k(5, 1, 5), pass_at_k(4, 2, 2)
    (0.2, 1.0, 0.8333333333333334)
    """
    return float(1 - Fraction(math.comb(n - c, k), math.comb(n, k)))
