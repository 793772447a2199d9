"""Comparing responses in pairs: which pairs, what the judge is asked, what it said, and what follows.

A pair is judged twice, with the responses in both places, because judges prefer a place. Two verdicts that contradict
each other make a tie.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

PLACES = ("{prompt}", "{first}", "{second}")
TEMPLATE = """\
Compare two answers to the same request. Judge how well each one does what was asked: whether it is correct, complete, \
clear and to the point. Do not let the order of the answers, their length or their tone decide.

[Request]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

[End of answer B]

First say briefly what is better and worse about each answer. Then end with your verdict on a line of its own: [[A]] \
if answer A is better, [[B]] if answer B is better, [[C]] if they are equally good."""
_VERDICT = re.compile(r"\[\[\s*([ABC])\s*\]\]", re.IGNORECASE)
_POINTS = {"A": 1.0, "B": 0.0, "C": 0.5}


def pairs_of(count: int, opponents: int | None, seed: str) -> list[tuple[int, int]]:
    """Pairs of `count` responses.

    Args:
        opponents: how many others each response meets, where there are that many: its neighbours in a circle in random
            order (one more where they cannot be paired up otherwise); None: all of them.
        seed: decides the order.
    """
    if opponents is None or opponents >= count - 1:
        return [(i, j) for i in range(count) for j in range(i + 1, count)]
    circle = list(range(count))
    random.Random(seed).shuffle(circle)
    steps = (opponents + 1) // 2
    found = {
        tuple(sorted((circle[i], circle[(i + step) % count]))) for step in range(1, steps + 1) for i in range(count)
    }
    return sorted(found)  # type: ignore[arg-type]


def asked(template: str, messages: Sequence[Mapping[str, Any]], first: str, second: str) -> str:
    """The judge's message. What stands for a place in a response is not replaced."""
    values = dict(zip(PLACES, (conversation(messages), first, second), strict=True))
    return re.sub("|".join(map(re.escape, PLACES)), lambda place: values[place[0]], template)


def conversation(messages: Sequence[Mapping[str, Any]]) -> str:
    """A prompt for a reader: the text of one user message; of several messages, each under its role."""
    if len(messages) == 1:
        return str(messages[0].get("content", ""))
    return "\n\n".join(f"{str(m['role']).capitalize()}: {m.get('content') or ''}" for m in messages)


def points_of(answer: str) -> float | None:
    """Points of the first response: 1 if it is better, 0 if the second is, 0.5 for a tie; None where the judge's answer
    has no verdict. The last verdict counts."""
    found = _VERDICT.findall(answer.rpartition("</think>")[2])
    return _POINTS[found[-1].upper()] if found else None


def shares(count: int, points: Mapping[tuple[int, int], float | None]) -> list[float | None]:
    """Share of wins of each response over what it was compared with; None of one that was compared with nothing.

    Args:
        count: responses.
        points: (first, second) -> `points_of` the judge's answer.
    """
    won, met = [0.0] * count, [0] * count
    for (first, second), value in points.items():
        if value is not None:
            won[first], won[second] = won[first] + value, won[second] + 1 - value
            met[first], met[second] = met[first] + 1, met[second] + 1
    return [won[i] / met[i] if met[i] else None for i in range(count)]
