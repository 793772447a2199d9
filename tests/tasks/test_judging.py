"""What answers are worth: exact match, pass@k, and files in the form of other judges."""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
import pytest

from fusemega.errors import UserError
from fusemega.fixtures import prompts as fixtures
from fusemega.fixtures.packages import AssetMissing
from fusemega.sampling.engine import LENGTH, REFUSED, STOP, SamplingSettings
from fusemega.sampling.prompts import PromptsConfig
from fusemega.tasks import run_file  # noqa: F401  (registers the tasks)
from fusemega.tasks.answers import read_items
from fusemega.tasks.arena_hard import markdown_counts
from fusemega.tasks.humaneval import pass_at_k
from fusemega.tasks.task import AnsweredBy, AnswerTask, TaskAnswer, TaskItem, build_task, parse_task

BY = AnsweredBy("some-model", 1.5)


def _task(name: str, path: Path, **settings: Any) -> tuple[AnswerTask, list[TaskItem]]:
    task = build_task(parse_task({"name": name, "data": {"path": str(path)}, **settings}, "tasks.t."))
    assert isinstance(task, AnswerTask)
    return task, read_items(task, PromptsConfig(path=str(path)), "tasks.t.")[0]


def _rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _with(item: TaskItem, *texts: str, reason: str = STOP, tokens: int | None = 5) -> TaskItem:
    return replace(item, answers=tuple(TaskAnswer(i, text, reason, tokens) for i, text in enumerate(texts)))


def test_exact_match_strict_and_flexible(tmp_path: Path) -> None:
    """GSM8K's form of answers and ASDiv's; a mean over rows of means over answers; refused answers do not count."""
    rows = [
        {"question": "q1", "answer": "3 * 14 = <<3*14=42>>42\n#### 42"},
        {"question": "q2", "answer": "1,000 apples"},
        {"question": "q3", "answer": 7},
        {"question": "q4", "answer": "1/2"},
    ]
    task, items = _task("gsm8k", _rows(tmp_path / "d.jsonl", rows), template="Q: {question}")
    assert items[0].messages == ({"role": "user", "content": "Q: q1"},)
    answered = [
        _with(items[0], "so 42.", "#### 42"),
        _with(items[1], "It is 1000.0\n#### 1000 apples", "no idea"),
        _with(items[2], "", reason=REFUSED),
        _with(items[3], "0.5, I think, not", reason=LENGTH),
    ]
    judged = task.judge(answered, BY)
    assert judged.figures["exact_match_strict"] == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert judged.figures["exact_match_flexible"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert judged.figures["exact_match_strict_stderr"] == pytest.approx((1 / 12) ** 0.5 / 3**0.5)
    assert judged.counts == {"rows": 4, "judged": 5, "no_mark": 3, "no_number": 1, "cut": 1, "refused": 1}
    assert [row["flexible"] for row in judged.rows] == [True, True, True, False, None, True]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "q", "answer": "12:30"}, "answer has 2 numbers"),
        ({"question": "q", "answer": "Mrs. Hilt"}, "answer has 0 numbers"),
        ({"question": "q"}, "the row has no answer"),
        ({"question": 3, "answer": "3"}, "question is a string"),
        ({"question": "q", "answer": "3", "shots": 5}, "tasks.t.data.unknown_fields"),
    ],
)
def test_an_unusable_row_is_named(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=r"d.jsonl:1: .*") as error:
        _task("gsm8k", _rows(tmp_path / "d.jsonl", [row]))
    assert said in str(error.value)


def test_unusable_rows_are_left_out_where_that_is_asked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = _rows(tmp_path / "d.jsonl", [{"question": "q", "answer": "a"}, {"question": "q", "answer": 1, "x": 1}])
    task, _ = _task("gsm8k", _rows(tmp_path / "e.jsonl", [{"question": "q", "answer": "1"}]))
    config = PromptsConfig(path=str(path), on_bad_row="skip", unknown_fields="ignore")
    assert [item.row["answer"] for item in read_items(task, config, "tasks.t.")[0]] == [1]
    with pytest.raises(UserError, match=r"no row is left to ask \(1 rows \(no number to compare\)\)"):
        read_items(task, config.model_copy(update={"limit": 1}), "tasks.t.")


def test_pass_at_k_is_the_share_of_draws_with_a_right_program() -> None:
    for n, k in ((1, 1), (4, 2), (6, 3), (6, 6)):
        for c in range(n + 1):
            programs = [i < c for i in range(n)]
            draws = [any(draw) for draw in itertools.combinations(programs, k)]
            assert pass_at_k(n, c, k) == pytest.approx(sum(draws) / len(draws), abs=1e-15)


def test_humaneval_runs_real_programs(tmp_path: Path) -> None:
    """Published solutions pass as whole functions and as continuations; nonsense and wrong ones fail."""
    try:
        rows = [json.loads(line) for line in fixtures.task_data().code.read_text(encoding="utf-8").splitlines()][:2]
    except AssetMissing as error:
        pytest.skip(str(error))
    task, items = _task("humaneval", _rows(tmp_path / "d.jsonl", rows), k=[1, 2], code={"timeout": 60}, workers=2)
    answered = []
    for item in items:
        row = item.row
        whole = f"Here it is:\n```python\n{row['prompt']}{row['canonical_solution']}```\nIt works."
        wrong = f"```python\ndef {row['entry_point']}(*_):\n    return 'no'\n```"
        answered.append(_with(item, whole, wrong, "I cannot program."))
    judged = task.judge([answered[0], _with(items[1], answered[1].answers[0].text)], BY)
    assert [row["passed"] for row in judged.rows] == [True, False, False, True]
    assert judged.figures["pass@1"] == pytest.approx((1 / 3 + 1) / 2)
    assert judged.figures["pass@2"] == pytest.approx(2 / 3)  # the second problem has one answer
    assert judged.counts["judged"] == 4 and judged.counts["problems of pass@2"] == 1


def test_more_programs_than_answers_are_refused(tmp_path: Path) -> None:
    row = {"task_id": "a/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f): pass"}
    task, _ = _task("humaneval", _rows(tmp_path / "d.jsonl", [row]), k=[1, 10])
    with pytest.raises(UserError, match="pass@10 needs as many answers to each problem, and sampling.n is 5"):
        task.check(SamplingSettings(n=5))


def test_outputs_are_joined_as_alpaca_eval_does(tmp_path: Path) -> None:
    """Read with pandas and merged with the reference by instruction, as alpaca_eval 0.6.6 does."""
    rows = [
        {"dataset": "koala", "instruction": " Two\nlines ", "output": "reference 1", "generator": "gpt4"},
        {"dataset": "vicuna", "instruction": "\u4f60\u597d", "output": "reference 2", "generator": "gpt4"},
    ]
    path = tmp_path / "alpaca_eval.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    task, items = _task("alpaca_eval", path)
    judged = task.judge([_with(items[0], " one \n"), _with(items[1], "", reason=REFUSED)], BY)
    outputs = pandas.read_json(io.StringIO(judged.files["outputs.json"]))
    assert list(outputs.columns) == ["dataset", "instruction", "output", "generator"]
    assert list(outputs["generator"].unique()) == ["some-model"]
    merged = pandas.merge(pandas.read_json(path), outputs, on=["instruction"], suffixes=("_1", "_2"))
    assert merged["output_2"].tolist() == ["one", ""] and merged["output_1"].tolist() == ["reference 1", "reference 2"]
    assert judged.counts == {"rows": 2, "cut": 0, "empty": 0, "refused": 1}
    with pytest.raises(UserError, match="sampling.n: 2 answers"):
        task.check(SamplingSettings(n=2))


def test_answers_have_the_form_of_arena_hards_own(tmp_path: Path) -> None:
    """Fields, their order and every count of markdown are those of the 750 answers that are published."""
    try:
        folder = fixtures.arena_hard()
    except AssetMissing as error:
        pytest.skip(str(error))
    content = (folder / "o3-mini-2025-01-31.jsonl").read_text(encoding="utf-8")
    published = [json.loads(line) for line in content.split("\n") if line]
    assert len(published) == 750
    for row in published:
        found = {"token_len": row["metadata"]["token_len"], **markdown_counts(row["messages"][-1]["content"]["answer"])}
        assert found == row["metadata"], row["uid"]
    task, items = _task("arena_hard", folder / "question.jsonl")
    by_uid = {row["uid"]: row for row in published}
    answered = [
        _with(item, by_uid[item.row["uid"]]["messages"][-1]["content"]["answer"], tokens=9) for item in items[:20]
    ]
    answered.append(_with(items[20], "x", tokens=None))
    judged = task.judge(answered, BY)
    lines = [json.loads(line) for line in judged.files["model_answer/some-model.jsonl"].split("\n") if line]
    for line in lines[:20]:
        original = by_uid[line["uid"]]
        assert list(line) == list(original) and list(line["metadata"]) == list(original["metadata"])
        assert line["messages"] == original["messages"]
    assert "metadata" not in lines[20] and judged.counts["no_metadata"] == 1
