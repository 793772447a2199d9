"""What is known of one response's correctness."""

from __future__ import annotations

from typing import NamedTuple


class Verdict(NamedTuple):
    """What a verifier found.

    Attributes:
        correct: whether the response is right; None where that could not be decided. An undecided response is no wrong
            one: it is counted, and takes no part in a selection.
        reason: why, in a few words that many responses share: they are counted by it.
    """

    correct: bool | None
    reason: str
