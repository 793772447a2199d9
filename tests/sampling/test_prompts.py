"""Prompts: the shapes of a row, what a prompt is known by, what is left out and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fusemega.errors import UserError
from fusemega.sampling.prompts import PromptsConfig, prompt_key, read_prompts
from tests.sampling.conftest import write_prompts

USER = {"role": "user", "content": "Hi"}


def test_the_key_is_of_the_messages_alone() -> None:
    keys = {prompt_key([{"content": "Hi", "role": "user"}]), prompt_key((USER,))}
    assert len(keys) == 1 and len(keys.pop()) == 32
    assert prompt_key([USER | {"content": "Hi "}]) != prompt_key([USER])
    assert prompt_key([USER]) == "0aa6c3fd4db41462694eefe06ab89f97", "files of earlier releases are continued"


def test_a_row_and_what_it_says(tmp_path: Path) -> None:
    about = {"domain": "maths", "answer": 18, "tests": "assert f(1)", "entry_point": "f", "id": "a/1"}
    path = write_prompts(tmp_path / "p.jsonl", [{"prompt": "2 + 16?", "system": "Be brief.", **about}])
    (prompt,) = read_prompts(PromptsConfig(path=str(path))).by_key.values()
    assert prompt.messages == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 16?"})
    assert prompt.about == about | {"answer": "18"} and prompt.source == f"{path}:1"


def test_duplicates_are_one_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[Any] = ["Hi", {"prompt": [USER]}, "Other", {"prompt": "Hi", "answer": "4"}, {"prompt": "Hi", "id": "b"}]
    path = write_prompts(tmp_path / "p.jsonl", rows)
    found = read_prompts(PromptsConfig(path=str(path)))
    assert (len(found), found.rows, found.duplicates, found.differing) == (2, 5, 3, (f"{path}:4 ({path}:1)",))
    assert "2 prompts in 5 rows; 3 duplicates left out, 1 of them with another domain, answer or tests: " in (
        capsys.readouterr().err
    )


def test_unusable_rows_and_fields_are_counted_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_prompts(tmp_path / "p.jsonl", [{"text": "a"}, {"prompt": "Hi", "colour": "red"}])
    config = PromptsConfig(path=str(path), on_bad_row="skip", unknown_fields="ignore")
    assert read_prompts(config).skipped == {"no prompt": 1}
    assert "1 prompts in 2 rows; skipped 1 (no prompt); fields left out: 1 (colour)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER]}, r":1: the row has no prompt \(keys: messages\)"),
        ({"prompt": None}, r":1: the row has no prompt \(keys: none\)"),
        ({"prompt": " "}, ":1: the prompt's last turn is empty"),
        ({"prompt": []}, ":1: prompt is empty"),
        ({"prompt": 3}, ":1: prompt is a list of messages, found a number"),
        (
            {"prompt": [USER, {"role": "assistant", "content": "x"}]},
            "prompt ends with a turn of role assistant; allowed: u",
        ),
        ({"prompt": "Hi", "answr": "4"}, r"the row has answr, .*prompts\.unknown_fields: ignore"),
        ({"prompt": "Hi", "answer": [4]}, ":1: answer is a string, found a list"),
    ],
)
def test_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write_prompts(tmp_path / "p.jsonl", [row])
    with pytest.raises(UserError, match=message):
        read_prompts(PromptsConfig(path=str(path)))


def test_no_prompts(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "p.jsonl", [])
    with pytest.raises(UserError, match=r"p\.jsonl: no prompts in 0 rows"):
        read_prompts(PromptsConfig(path=str(path)))
    write_prompts(path, [{"text": "a"}, {"text": "b"}])
    with pytest.raises(UserError, match=r"no prompts in 2 rows \(2 \(no prompt\)\)"):
        read_prompts(PromptsConfig(path=str(path), on_bad_row="skip"))
