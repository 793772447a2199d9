"""Maths answers: compared by value; the same from any thread; hostile ones end."""

from __future__ import annotations

import asyncio
from threading import Thread

import pytest

from fusemega.errors import UserError
from fusemega.reward.maths import check_maths

RIGHT = [
    ("18", "So she has \\boxed{18}."),
    ("18", "The answer is 18."),
    ("18 apples", "Together $9 + 9 = 18$."),
    ("\\frac{1}{2}", "It is $0.5$"),
    ("1/2", "\\boxed{\\frac{2}{4}}"),
    ("He has 9 + 9 = 18\n#### 1,234", "The answer is 1234."),
    ("x^2 + 1", "$1 + x^2$"),
    ("-3", "<think>\\boxed{3}</think>\\boxed{-3}"),
    ("(1, 2)", "\\boxed{(1,2)}"),
    ("A", "The answer is \\boxed{A}"),
]
WRONG = [("72", "\\boxed{71}"), ("5", "I do not know."), ("1/3", "0.3"), ("3", "")]
HOSTILE = {
    "huge power": "\\boxed{10^{10^{10}}}",
    "tower": "\\boxed{" + "9^" * 40 + "9}",
    "brackets": "\\boxed{" + "(" * 20_000 + "1" + ")" * 20_000 + "}",
    "fractions": "\\boxed{" + "\\frac{1}{" * 500 + "2" + "}" * 501,
    "sum": "\\boxed{\\sum_{i=1}^{10^{12}} \\sin(i)^{i!}}",
    "simplification": "\\boxed{(x+1)^{100000} - (x+2)^{99999}}",
    "long text": "1 " * 500_000,
    "many boxes": "\\boxed{" * 20_000,
    "no text": "\ud800 \x00 \\boxed{\ud800}",
}


def test_compared_by_value() -> None:
    found = check_maths([*RIGHT, *WRONG], workers=2)
    assert [verdict.correct for verdict in found] == [True] * len(RIGHT) + [False] * len(WRONG)
    assert {verdict.reason for verdict in found} == {"right", "wrong", "no answer found"}
    assert check_maths([("", "\\boxed{1}")]) == [(None, "the right answer is not understood")]


def test_hostile_answers_end_and_are_never_right() -> None:
    """They cost what they cost and no more; those that come after are compared as before."""
    pairs = [pair for text in HOSTILE.values() for pair in (("7", text), ("7", "\\boxed{7}"))]
    found = check_maths(pairs, timeout=1.0, workers=2)
    assert [verdict.correct for verdict in found[1::2]] == [True] * len(HOSTILE)
    of = dict(zip(HOSTILE, found[::2], strict=True))
    assert [name for name, verdict in of.items() if verdict.correct] == []
    assert of["huge power"] == (None, "timed out")


def test_the_same_from_a_thread_and_from_asyncio() -> None:
    pairs = [("18", "\\boxed{18}"), ("18", "\\boxed{17}"), ("3", "\\boxed{10^{10^{10}}}")]
    found: list[object] = [check_maths(pairs, 1.0)]
    thread = Thread(target=lambda: found.append(check_maths(pairs, 1.0)))
    thread.start()
    thread.join()

    async def inside() -> None:
        found.append(await asyncio.to_thread(check_maths, pairs, 1.0))

    asyncio.run(inside())
    assert found == [[(True, "right"), (False, "wrong"), (None, "timed out")]] * 3


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'fusemega\[verify\]'"):
        check_maths([("1", "1")])
