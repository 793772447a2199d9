"""A task's questions, asked and recorded as `fusemega sample` does it: nothing is asked twice.

OUT/TASK/prompts.jsonl     a line for each row: its question
OUT/TASK/responses.jsonl   the answers, which only grow; `sampling/responses.py` has the form
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from fusemega.errors import UserError
from fusemega.files.output import write_durably
from fusemega.runtime.console import say
from fusemega.sampling.engine import Engine, SamplingSettings
from fusemega.sampling.engines import EngineSettings
from fusemega.sampling.prompts import PromptsConfig, prompt_key
from fusemega.sampling.responses import read_made, read_responses
from fusemega.sampling.run_file import SampleRun
from fusemega.sampling.sample import sample
from fusemega.tasks.task import AnswerTask, TaskAnswer, TaskItem
from fusemega.text.data import DataConfig, Source
from fusemega.text.fields import BadRow, check_extras, kind


def read_items(task: AnswerTask, data: PromptsConfig, at: str) -> tuple[list[TaskItem], str]:
    """The rows of a task's data, with their questions; and a hash of the data. Says once what was left out.

    Args:
        at: the task's place in the run file, for messages.

    Raises:
        UserError: an unusable row (its file and line), or none at all.
    """
    source = Source(DataConfig(path=data.path, name=data.name, split=data.split))
    ignored: Counter[str] | None = Counter() if data.unknown_fields == "ignore" else None
    skipped: Counter[str] = Counter()
    items: list[TaskItem] = []
    for row in islice(source.rows(), data.limit):
        place = f"{source.names[row.file]}:{row.number}"
        try:
            items.append(_item(task, row.value, place, ignored))
        except BadRow as error:
            if data.on_bad_row == "error":
                raise UserError(f"{place}: {error.detail.replace('data.', f'{at}data.')}") from None
            skipped[error.reason] += 1
    left_out = [f"{count} rows ({reason})" for reason, count in skipped.items()]
    left_out += [f"the field {name} of {count} rows" for name, count in (ignored or {}).items()]
    if not items:
        raise UserError(f"{', '.join(source.names)}: no row is left to ask ({', '.join(left_out) or 'no rows'})")
    if left_out:
        say(f"{at}data: left out {', '.join(left_out)}")
    return items, source.content_hash()


def _item(task: AnswerTask, row: object, place: str, ignored: Counter[str] | None) -> TaskItem:
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, Mapping):
        raise BadRow("wrong type", f"a row is an object, found {kind(row)}")
    present = {str(name): value for name, value in row.items() if value is not None}
    for name in task.required:
        if name not in present:
            raise BadRow("a field is missing", f"the row has no {name} (keys: {', '.join(sorted(present)) or 'none'})")
    check_extras(present, (*task.required, *task.optional), "the row", ignored)
    messages = tuple(task.messages(present))
    if not messages[-1]["content"].strip():
        raise BadRow("empty", "the question is empty")
    return TaskItem(present, place, messages, prompt_key(messages))


def answered(
    items: Sequence[TaskItem],
    folder: Path,
    settings: EngineSettings,
    engine: Engine,
    sampling: SamplingSettings,
    generator: str,
) -> list[TaskItem]:
    """The items with their answers; asks for those that `folder` lacks.

    Raises:
        UserError: `folder` has answers of another model or other settings.
        Missing: some questions got no answer; the others are recorded, and the next call goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prompts, responses = folder / "prompts.jsonl", folder / "responses.jsonl"
    write_durably(prompts, "".join(json.dumps({"prompt": list(item.messages)}) + "\n" for item in items))
    config = PromptsConfig(path=str(prompts))
    sample(
        SampleRun(source=generator, prompts=config, output=str(responses), engine=settings, sampling=sampling), engine
    )
    wanted = {item.key for item in items}
    found: dict[str, list[TaskAnswer]] = {}
    for row in read_responses(responses, read_made(responses)):
        if row["key"] in wanted and row["sample"] < sampling.n:
            answer = TaskAnswer(row["sample"], row["text"], row["finish_reason"], row["tokens"])
            found.setdefault(row["key"], []).append(answer)
    return [replace(item, answers=tuple(sorted(found[item.key], key=_number))) for item in items]


def _number(answer: TaskAnswer) -> Any:
    return answer.sample
