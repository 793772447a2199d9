"""Simple rules, by name: each gives a response 0 to 1."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from fusemega.config import Section, choose_section
from fusemega.errors import UserError


class RewardRule(Section):
    """What all rules have."""

    name: str
    weight: float = Field(1.0, description="what the reward gets for a 1 of this rule; may be negative")

    def score(self, response: str, about: Mapping[str, str]) -> float:
        """0 to 1.

        Args:
            about: what the row says of its prompt: domain, answer.
        """
        raise NotImplementedError


R = TypeVar("R", bound=type[RewardRule])
RULES: dict[str, type[RewardRule]] = {}


def rule(name: str) -> Callable[[R], R]:
    """Registers a rule under its name."""

    def register(cls: R) -> R:
        RULES[name] = cls
        return cls

    return register


@rule("length")
class LengthRule(RewardRule):
    """1 for a response whose length is within bounds, else 0."""

    name: Literal["length"] = "length"
    unit: Literal["characters", "words"] = Field("characters", description="words are what white space separates")
    min: int = Field(0, ge=0, description="shortest length")
    max: int | None = Field(None, ge=1, description="longest length")

    @model_validator(mode="after")
    def _is_a_range(self) -> LengthRule:
        """max is not less than min; one of them is given."""
        if self.max is None and not self.min or self.max is not None and self.max < self.min:
            raise ValueError(f"min {self.min} and max {self.max} bound no length")
        return self

    def score(self, response: str, about: Mapping[str, str]) -> float:
        """See `RewardRule.score`."""
        length = len(response) if self.unit == "characters" else len(response.split())
        return float(length >= self.min and (self.max is None or length <= self.max))


@rule("pattern")
class PatternRule(RewardRule):
    """1 for a response in which a regular expression is found (or is not)."""

    name: Literal["pattern"] = "pattern"
    pattern: str = Field(description="a regular expression of Python's `re`; `.` matches line ends too")
    absent: bool = Field(False, description="1 where it is not found")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value

    def score(self, response: str, about: Mapping[str, str]) -> float:
        """See `RewardRule.score`."""
        return float(bool(re.search(self.pattern, response, re.DOTALL)) != self.absent)


@rule("exact")
class ExactRule(RewardRule):
    """1 for a response that is the row's `answer`, but for case, white space and a final full stop."""

    name: Literal["exact"] = "exact"

    def score(self, response: str, about: Mapping[str, str]) -> float:
        """See `RewardRule.score`.

        Raises:
            UserError: the row has no answer.
        """
        if "answer" not in about:
            raise UserError("the rule exact needs `answer`, which the row does not have")
        return float(_plain(response) == _plain(about["answer"]))


@rule("cjk")
class CJKRule(RewardRule):
    """Share of a response's letters that are Chinese, Japanese or Korean; 1 from `min` on if that is given."""

    name: Literal["cjk"] = "cjk"
    min: float | None = Field(
        None, gt=0, le=1, description="1 for at least this share, else 0; default: the share itself"
    )

    def score(self, response: str, about: Mapping[str, str]) -> float:
        """See `RewardRule.score`."""
        letters = [c for c in response if unicodedata.category(c).startswith("L")]
        share = sum(map(_is_cjk, letters)) / len(letters) if letters else 0.0
        return share if self.min is None else float(share >= self.min)


def parse_rule(section: Mapping[str, Any], at: str) -> RewardRule:
    """The rule that `section["name"]` picks.

    Args:
        at: the section's place in the run file, for messages.

    Raises:
        UserError: no name or an unknown one (with the nearest), unknown or wrong settings by key.
    """
    return choose_section(RULES, section, at)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".").removesuffix("。").rstrip()


def _is_cjk(letter: str) -> bool:
    name = unicodedata.name(letter, "")
    return name.startswith(("CJK ", "HIRAGANA", "KATAKANA", "HANGUL"))
