"""What a part finds, row by row, in a file that is whole up to the last row however the part ends."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

OK, WRONG, FOUND, MEASURED, NOT_MEASURED = "ok", "WRONG", "found", "measured", "not measured"


class NotHereError(Exception):
    """This machine lacks what a part or a case needs; the text says what."""


@dataclass(frozen=True)
class Row:
    """One finding.

    Attributes:
        what: that was looked at.
        verdict: OK or WRONG of a comparison; FOUND of a fact; MEASURED of a figure without a bound; NOT_MEASURED.
        found: the figure, or words.
        unit: of the figure.
        allowed: the most that a comparison allows; None for no bound.
        details: for the JSON alone: curves, tables.
    """

    what: str
    verdict: str
    found: Any = None
    unit: str = ""
    allowed: float | None = None
    details: Any = None


class Report:
    """Writes rows to `path`, one JSON object a line, each flushed at once."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (open until the process ends)

    def add(self, row: Row) -> None:
        self._file.write(json.dumps(asdict(row)) + "\n")
        self._file.flush()

    def compare(self, what: str, error: float, allowed: float, unit: str = "", details: Any = None) -> None:
        """An error and the most that is allowed of it. What is not a number is wrong."""
        self.add(Row(what, OK if error <= allowed else WRONG, error, unit, allowed, details))

    def require(self, what: str, condition: bool, found: Any, details: Any = None) -> None:
        self.add(Row(what, OK if condition else WRONG, found, details=details))

    def fact(self, what: str, found: str) -> None:
        self.add(Row(what, FOUND, found))

    def measured(self, what: str, found: Any, unit: str = "", details: Any = None) -> None:
        self.add(Row(what, MEASURED, found, unit, details=details))

    def not_measured(self, what: str, why: str) -> None:
        self.add(Row(what, NOT_MEASURED, why))

    @contextmanager
    def case(self, what: str) -> Iterator[None]:
        """A case of a part: where it fails that is a row, and the next case follows. The traceback goes to the log."""
        try:
            yield
        except NotHereError as error:
            self.not_measured(what, str(error))
        except Exception as error:
            traceback.print_exc()
            self.add(Row(what, WRONG, in_a_line(error)))


def in_a_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def read_rows(path: Path) -> list[Row]:
    """The rows that a part has written; without a last one that was cut off."""
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else []:
        try:
            rows.append(Row(**json.loads(line)))
        except json.JSONDecodeError:
            continue
    return rows
