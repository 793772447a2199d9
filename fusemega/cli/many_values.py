"""Options that take several values, as other tools' commands do: `--models A B C`."""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperCommand


class ManyValues(TyperCommand):
    """Lets an option of `lists` take all values up to the next option or KEY=VALUE: `--models A B C`."""

    lists: tuple[str, ...] = ("--models", "--weights")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spread: list[str] = []
        option = ""
        for argument in args:
            if is_override(argument):
                option = ""
            if argument.startswith("-") and not _is_number(argument):  # a negative weight is a value
                option = argument if argument in self.lists else ""
                spread += [] if option else [argument]
            else:
                spread += [option, argument] if option else [argument]
        return super().parse_args(ctx, spread)


def is_override(text: str) -> bool:
    """Whether an argument is a KEY=VALUE, which replaces a value of the run file."""
    return re.match(r"[a-z_][\w.]*=", text) is not None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
