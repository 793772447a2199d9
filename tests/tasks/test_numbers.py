"""Numbers in texts: what is read, what is not, and that no text takes long."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from fusemega.tasks.gsm8k import after_mark, last_number
from fusemega.tasks.numbers import numbers_in


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("42", ["42"]),
        ("the answer is 42.", ["42"]),
        ("9 apples", ["9"]),
        ("$1,234.50 in all", ["2469/2"]),
        ("1,234,567 and 12,34", ["1234567", "12", "34"]),
        ("10{,}000", ["10000"]),
        ("-3 and \u22124 and - 5", ["-3", "-4", "-5"]),
        ("10-4=6", ["10", "4", "6"]),
        ("from 3-5", ["3", "5"]),
        (".5 = 0.50 = 1/2 = 2 / 4", ["1/2"] * 4),
        ("2 1/2 cups", ["5/2"]),
        (r"\frac{3}{4} or $\dfrac{1}{2}$", ["3/4", "1/2"]),
        (r"-\frac{3}{4}", ["-3/4"]),
        ("1/0 and 2 1/0", []),
        ("12:30", ["12", "30"]),
        ("50%", ["50"]),
        ("x2 and a3", []),
        ("3.5.7", ["7/2"]),
        ("nine", []),
        ("", []),
    ],
)
def test_what_is_read(text: str, numbers: list[str]) -> None:
    assert [str(number) for number in numbers_in(text)] == numbers


@pytest.mark.parametrize(
    "text", [*(part * 10_000 for part in ("9", "1,", "111,", "1/", "-", "1 ", " ", ".")), "111," * 10_000 + "1111"]
)
def test_noise_gives_no_wrong_number_and_no_error(text: str) -> None:
    assert all(isinstance(number, Fraction) for number in numbers_in(text))
    assert numbers_in("9" * 10_000) == []


def test_a_number_written_in_any_way_is_the_same() -> None:
    rng = random.Random(0)
    for _ in range(200):
        value = Fraction(rng.randrange(1, 10_000_000), rng.choice([1, 2, 4, 5, 8, 10]))
        decimal = f"{float(value):,.3f}"
        forms = [f"${decimal}", decimal.replace(",", ""), f"{decimal} miles", f"so {decimal}."]
        if value.denominator > 1:
            forms += [f"{value}", rf"\frac{{{value.numerator}}}{{{value.denominator}}}"]
        assert {last_number(form) for form in forms} == {value}


def test_the_number_after_the_last_mark() -> None:
    assert after_mark("#### 3\nno: #### $1,000 dollars\n7") == 1000
    assert after_mark("#### none\n7") is None and after_mark("7") is None
    assert last_number("7 apples, then 8. That is all") == 8
