"""Task `alpaca_eval`: outputs in the form that the `alpaca_eval` tool reads, which judges them.

`outputs.json` is an array of objects with `dataset`, `instruction`, `output` and `generator`, in the order of the data:

    alpaca_eval evaluate --model_outputs OUT/alpaca_eval/outputs.json

The tool joins outputs with its reference by the text of the instruction, so that is kept to the letter.
"""

from __future__ import annotations

import json
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
    TaskItem,
    one_answer,
    register,
)
from fusemega.text.fields import string


class AlpacaEvalSettings(AnswerSettings):
    """Rows of AlpacaEval: `instruction`, and `dataset` where they have it; a reference's `output` is not read."""

    name: Literal["alpaca_eval"] = "alpaca_eval"


@register("alpaca_eval")
class AlpacaEval(AnswerTask):
    """See the module."""

    Settings = AlpacaEvalSettings
    required = ("instruction",)
    optional = ("dataset", "datasplit", "output", "generator")

    def check(self, sampling: SamplingSettings) -> None:
        """See `AnswerTask.check`."""
        one_answer(sampling)

    def messages(self, row: Mapping[str, Any]) -> list[Message]:
        """See `AnswerTask.messages`."""
        return [{"role": "user", "content": string(row["instruction"], "instruction")}]

    def judge(self, items: Sequence[TaskItem], by: AnsweredBy) -> Judged:
        """See `AnswerTask.judge`."""
        counts = Counter(rows=len(items), cut=0, empty=0, refused=0)
        outputs, rows = [], []
        for item in items:
            (answer,) = item.answers
            counts.update(
                cut=answer.finish_reason == LENGTH,
                refused=answer.refused,
                empty=not answer.refused and not answer.text.strip(),
            )
            about = {name: item.row[name] for name in ("dataset", "datasplit") if name in item.row}
            outputs.append(
                {
                    **about,
                    "instruction": item.row["instruction"],
                    "output": answer.text.strip(),  # as the tool does with what it generates itself
                    "generator": by.generator,
                }
            )
            rows.append({"row": item.place, "text": answer.text, "tokens": answer.tokens})
        figures = {"mean_characters": fmean(len(each["output"]) for each in outputs)}
        content = json.dumps(outputs, ensure_ascii=False, indent=1) + "\n"
        return Judged({**figures}, dict(counts), rows, {"outputs.json": content})
