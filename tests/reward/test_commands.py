"""`verify`, `judge` and `rules`: what they write, what they refuse, and what an interrupted one does not do again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fusemega.config import validate
from fusemega.errors import UserError
from fusemega.reward import verify as verifying
from fusemega.reward.comparisons import TEMPLATE, asked, pairs_of, points_of, shares
from fusemega.reward.judge import JudgeRun, judge
from fusemega.reward.rules import RulesRun, apply_rules
from fusemega.reward.verify import VerifyRun, verify
from fusemega.sampling.engine import Missing
from tests.sampling import server
from tests.sampling.server import MODEL, serve

EXAMPLE = Path(__file__).parents[2] / "examples" / "reward" / "groups.jsonl"


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def run_of(kind: Any, data: object, output: Path, **more: Any) -> Any:
    return validate(kind, {"data": str(data), "output": str(output), **more}, "run.yaml")


def test_verify(tmp_path: Path) -> None:
    found = verify(run_of(VerifyRun, EXAMPLE, tmp_path / "out.jsonl", workers=2))
    assert (found.rows, found.responses, found.correct, found.wrong, found.undecided, found.not_asked) == (
        3,
        6,
        2,
        2,
        0,
        2,
    )
    assert found.reasons == {"maths": {"right": 1, "wrong": 1}, "code": {"passes": 1, "wrong answer": 1}}
    maths, code, other = rows_of(tmp_path / "out.jsonl")
    assert [each["correct"] for row in (maths, code) for each in row["responses"]] == [True, False, True, False]
    assert maths["responses"][0]["verdict"] == "right" and other == rows_of(EXAMPLE)[2]


def test_verify_counts_what_cannot_be_decided(tmp_path: Path) -> None:
    data = write(
        tmp_path / "rows.jsonl",
        {"prompt": "a", "responses": ["\\boxed{10^{10^{10}}}", "3"], "answer": 3, "extra": [1]},
        {"prompt": "b", "responses": [{"text": "3"}], "domain": "maths"},
    )
    found = verify(run_of(VerifyRun, data, tmp_path / "out.jsonl", maths={"timeout": 1.0}))
    assert (found.correct, found.wrong, found.undecided) == (1, 0, 2)
    assert found.reasons == {"(no domain)": {"timed out": 1, "right": 1}, "maths": {"the row has no answer": 1}}
    first, second = rows_of(tmp_path / "out.jsonl")
    assert first["extra"] == [1] and first["responses"][0]["correct"] is None
    assert second["responses"] == [{"text": "3", "correct": None, "verdict": "the row has no answer"}]


def test_nothing_to_verify_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "rows.jsonl", {"prompt": "a", "responses": ["b"]})
    assert verify(run_of(VerifyRun, data, tmp_path / "out.jsonl")).not_asked == 1
    assert "no row has `answer` (maths) or `tests` (code), so nothing is verified" in capsys.readouterr().err


def test_an_interrupted_verify_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": str(i), "responses": [f"\\boxed{{{i}}}", "\\boxed{7}"], "answer": str(i)} for i in range(6)]
    data, out, whole = write(tmp_path / "rows.jsonl", *rows), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    verify(run_of(VerifyRun, data, whole, workers=1))
    checked: list[int] = []
    original = verifying.maths_verdicts

    def stops(pairs: Any, *rest: Any) -> Any:
        checked.append(len(pairs))
        for number, found in enumerate(original(pairs, *rest)):
            if number == 4 and len(checked) == 1:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(verifying, "maths_verdicts", stops)
    with pytest.raises(KeyboardInterrupt):
        verify(run_of(VerifyRun, data, out, workers=1))
    assert not out.exists()
    with pytest.raises(UserError, match=r"begun with another model or settings \(maths differ"):
        verify(run_of(VerifyRun, data, out, maths={"timeout": 3.0}))
    verify(run_of(VerifyRun, data, out, workers=1))
    assert checked == [12, 8] and out.read_bytes() == whole.read_bytes()
    with pytest.raises(UserError, match="exists; nothing is overwritten"):
        verify(run_of(VerifyRun, data, out))


BAD = {
    "no responses": ({"prompt": "a"}, "rows.jsonl:1: the row has no responses"),
    "empty": ({"prompt": "a", "responses": []}, "responses is a list of one or more"),
    "a number": ({"prompt": "a", "responses": [3]}, r"responses\[0\] is a text, found"),
    "answered": ({"prompt": "a", "responses": [{"text": "b", "correct": True}]}, r"responses\[0\].correct already"),
    "tests": ({"prompt": "a", "responses": ["b"], "tests": ["x"]}, "tests is a text, found"),
}


@pytest.mark.parametrize("name", BAD)
def test_rows_that_are_refused(name: str, tmp_path: Path) -> None:
    row, message = BAD[name]
    with pytest.raises(UserError, match=message):
        verify(run_of(VerifyRun, write(tmp_path / "rows.jsonl", row), tmp_path / "out.jsonl"))
    assert not (tmp_path / "out.jsonl").exists()


def test_pairs_and_shares() -> None:
    assert pairs_of(3, None, "") == pairs_of(3, 2, "") == [(0, 1), (0, 2), (1, 2)]
    few = pairs_of(20, 4, "seed")
    assert len(few) == len(set(few)) == 40 and all(sum(i in pair for pair in few) == 4 for i in range(20))
    assert few == pairs_of(20, 4, "seed") != pairs_of(20, 4, "other")
    assert [points_of(text) for text in ("[[B]] no: [[A]]", "[[ b ]]", "[[C]]", "A", "<think>[[A]]</think>")] == [
        *(1.0, 0.0, 0.5),
        *(None, None),
    ]
    # 0 wins both times against 1; the places contradict each other between 1 and 2; 0 and 2: one answer is missing.
    points = {(0, 1): 1.0, (1, 0): 0.0, (1, 2): 1.0, (2, 1): 1.0, (0, 2): 0.5, (2, 0): None}
    assert shares(4, points) == [2.5 / 3, 0.25, 0.5, None]
    text = asked("{prompt}|{first}|{second}", [{"role": "user", "content": "{second}"}], "{prompt}", "b")
    assert text == "{second}|{prompt}|b" and "[[C]]" in TEMPLATE


def longest_wins(text: str, seed: int) -> str:
    """The judge of these tests. Of a request that says `tie`, a tie; of one that says `broken`, no verdict; of one that
    says `place`, the first place."""
    prompt, first, second = text.split("|")
    if prompt == "broken":
        return "They are both good."
    if prompt in ("tie", "place"):
        return {"tie": "[[C]]", "place": "[[A]]"}[prompt]
    return "Better: [[A]]" if len(first) > len(second) else "Better: [[B]]"


def judge_run(url: str, data: str, output: Path, **more: Any) -> Any:
    engine = {"name": "openai", "base_url": url, "model": MODEL, "concurrency": 2, "max_retries": 0}
    return run_of(JudgeRun, data, output, **({"engine": engine, "template": "{prompt}|{first}|{second}"} | more))


def test_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real server. Both orders are asked, nothing twice; missing answers are asked for by the next command."""
    monkeypatch.setattr(server, "answer", longest_wins)
    responses = [{"text": "ccc", "source": "x"}, "a", "bb"]
    prompts = ("length", "tie", "place", "broken")
    data = write(tmp_path / "rows.jsonl", *({"prompt": prompt, "responses": responses} for prompt in prompts))
    out = tmp_path / "out.jsonl"
    with serve() as served:
        served.faults["tie|a|bb"] = ["500"]
        with pytest.raises(Missing, match="1 of 24"):
            judge(judge_run(served.url, data, out))
        assert not out.exists() and sum(served.asked.values()) == 24
        found = judge(judge_run(served.url, data, out))
        assert sum(served.asked.values()) == 25
    rewards = [[each.get("reward") for each in row["responses"]] for row in rows_of(out)]
    assert rewards == [[1.0, 0.0, 0.5], [0.5] * 3, [0.5] * 3, [None] * 3]
    assert rows_of(out)[0]["responses"][0] == {"text": "ccc", "source": "x", "reward": 1.0}
    assert (found.comparisons, found.answers, found.malformed, found.ties) == (12, 24, 6, 6)
    assert (found.contradictions, found.first, found.rows_without) == (3, 0.75, 1)


def test_judge_refusals(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", {"prompt": "a", "responses": ["b"]})
    with pytest.raises(UserError, match="no row has two responses to compare"):
        judge(judge_run("http://127.0.0.1:9/v1", data, tmp_path / "out.jsonl"))
    with pytest.raises(UserError, match=r"template: has no \{second\}"):
        judge_run("http://a", data, tmp_path / "out.jsonl", template="{prompt} {first}")
    with pytest.raises(UserError, match="sampling: n: a pair is judged once"):
        judge_run("http://a", data, tmp_path / "out.jsonl", sampling={"n": 2, "temperature": 1.0})


RULES = [
    ({"name": "length", "max": 4}, "abcde", 0.0),
    ({"name": "length", "min": 2, "unit": "words"}, "ab cd", 1.0),
    ({"name": "pattern", "pattern": "a.c"}, "xa\ncx", 1.0),
    ({"name": "pattern", "pattern": "a", "absent": True}, "a", 0.0),
    ({"name": "exact"}, " BLUE  sky.\n", 1.0),
    ({"name": "exact"}, "the blue sky", 0.0),
    ({"name": "cjk"}, "你好, ab 12!", 0.5),
    ({"name": "cjk", "min": 0.6}, "你好 ab", 0.0),
]


@pytest.mark.parametrize(("rule", "response", "score"), RULES)
def test_rules(rule: dict[str, Any], response: str, score: float, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", {"prompt": "a", "responses": [response], "answer": "Blue sky"})
    both = [rule, {"name": "length", "min": 1, "weight": -2}]
    found = apply_rules(run_of(RulesRun, data, tmp_path / "out.jsonl", rules=both))
    assert rows_of(tmp_path / "out.jsonl")[0]["responses"] == [{"text": response, "reward": score - 2}]
    assert found.means == [score, 1.0] and found.mean_reward == score - 2


def test_rules_refusals(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", {"prompt": "a", "responses": ["b"]})
    for rule, message in (
        ({"name": "lenght"}, r"rules\[0\].name: unknown name 'lenght' \(did you mean 'length'\?\)"),
        ({"name": "length"}, "bound no length"),
        ({"name": "pattern", "pattern": "("}, r"rules\[0\].pattern: not a regular expression"),
        ({"name": "exact"}, "rows.jsonl:1: the rule exact needs `answer`"),
    ):
        with pytest.raises(UserError, match=message):
            apply_rules(run_of(RulesRun, data, tmp_path / "out.jsonl", rules=[rule]))
    assert not (tmp_path / "out.jsonl").exists()
