"""Numbers in texts, and what they are worth.

Read are integers, decimals, fractions (3/4, 1 1/2, \\frac{3}{4}), each with a sign, with commas or LaTeX's {,} between
thousands, and with whatever stands before or behind it: currencies, units, per cent. Words ("nine") are no numbers.
"""

from __future__ import annotations

import re
from fractions import Fraction

_DIGITS = 200  # of one number; longer ones are noise that a model repeats
_WHOLE = r"\d{1,3}(?:,\d{3}){1,60}(?!,?\d)|\d+"  # bounded, so that no text takes long
_DECIMAL = rf"(?:{_WHOLE})(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"""(?<![\w.])(?P<sign>[-+\u2212]\s?)?[$\u20ac\u00a3]?\s?
    (?:\\[dt]?frac\{{(?P<top>{_DECIMAL})\}}\{{(?P<bottom>{_DECIMAL})\}}
    |(?P<mixed>\d+)\s+(?P<part>\d+)\s?/\s?(?P<of>\d+)
    |(?P<number>{_DECIMAL})(?:\s?/\s?(?P<under>\d+))?)""",
    re.VERBOSE,
)


def numbers_in(text: str) -> list[Fraction]:
    """The numbers of a text, in order. Those with more than 200 digits, or 0 under a fraction's line, are left out.

    >>> [str(number) for number in numbers_in("She paid $1,234.50 for 2 1/2 of -3 boxes.")]
    ['2469/2', '5/2', '-3']
    """
    found = []
    for match in _NUMBER.finditer(text.replace("{,}", ",")):
        value = _value(match)
        if value is not None:
            found.append(value)
    return found


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match[0]) > _DIGITS:
        return None
    try:
        if match["top"] is not None:
            value = _plain(match["top"]) / _plain(match["bottom"])
        elif match["mixed"] is not None:
            value = _plain(match["mixed"]) + Fraction(int(match["part"]), int(match["of"]))
        else:
            value = _plain(match["number"]) / int(match["under"] or 1)
    except ZeroDivisionError:
        return None
    return -value if (match["sign"] or "+").strip() in "-\u2212" else value


def _plain(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))
