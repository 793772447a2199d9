"""Reads JSON files from any source, with limits: UTF-8, 100 levels, numbers of reasonable length, every key once.

Python's reader accepts NaN, which is not JSON, silently drops one of two equal keys, turns 1e400 into infinity, and
raises one of four exceptions. Here there is one exception, and the result is safe to walk through.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

from fusemega.errors import UserError
from fusemega.files.opening import TEXT_BYTES, read_bytes

DEPTH = 100
INTEGER_DIGITS = 40  # transformers writes 10^30 for "no limit"
FLOAT_CHARACTERS = 400
LINES_BYTES = 1 << 30


class MalformedError(ValueError):
    """The text is not JSON, or exceeds a limit. The message says what is wrong, but not in which file.

    Attributes:
        line: counted from 1, where it is known.
    """

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


def parse_json(content: bytes | str, *, digits: int = INTEGER_DIGITS, finite: bool = True) -> Any:
    """The value of a JSON text.

    Args:
        content: a text, or its UTF-8 bytes, with or without a byte order mark.
        digits: the most that an integer may have.
        finite: refuse NaN, Infinity, and what is larger than a float can be.

    Raises:
        MalformedError: the text is not JSON, or exceeds a limit.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        value = _decoder(digits, finite).decode(text)
    except UnicodeDecodeError as error:
        raise MalformedError(f"not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise MalformedError(f"malformed JSON: {error.msg}", error.lineno) from None
    except RecursionError:
        raise _too_deep() from None
    level = [value]
    for _ in range(DEPTH):
        level = [inner for outer in level for inner in _members(outer) if isinstance(inner, dict | list)]
        if not level:
            return value
    raise _too_deep()


def read_json(path: str | Path, limit: int = TEXT_BYTES, what: str = "", finite: bool = True) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        limit: the most bytes it may have.
        what: as in `open_regular`.
        finite: as in `parse_json`.

    Raises:
        UserError: it cannot be read, is malformed or beyond the bounds (with its line), or no object.
    """
    content = read_bytes(path, limit, what)
    try:
        value = parse_json(content, finite=finite)
    except MalformedError as error:
        raise UserError(f"{path}{f':{error.line}' if error.line else ''}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def read_lines(path: str | Path, limit: int = LINES_BYTES, finite: bool = True) -> tuple[list[tuple[int, Any]], bool]:
    """A file of lines of JSON that grows while a process runs; blank lines are left out.

    Returns:
        (line counted from 1, value) of each whole line; and whether half a line at the end, as a killed process leaves
        it, was left out.

    Raises:
        UserError: it cannot be read, or a whole line is malformed; names the line.
    """
    *whole, half = read_bytes(path, limit).split(b"\n")
    values = []
    for number, line in enumerate(whole, start=1):
        try:
            if line.strip():
                values.append((number, parse_json(line, finite=finite)))
        except MalformedError as error:
            raise UserError(f"{path}:{number}: {error}") from None
    return values, bool(half)


@functools.cache
def _decoder(digits: int, finite: bool) -> json.JSONDecoder:
    def integer(text: str) -> int:
        if len(text.lstrip("-")) > digits:
            raise MalformedError(f"malformed JSON: an integer of {len(text)} digits; allowed: {digits}")
        return int(text)

    def real(text: str) -> float:
        value = float(text)
        if len(text) > FLOAT_CHARACTERS or (finite and not math.isfinite(value)):
            shown = text if len(text) <= 40 else f"{text[:40]}..."
            raise MalformedError(f"malformed JSON: {shown} is not a finite number, or too long")
        return value

    # NaN and Infinity go to `parse_constant` as words; `real` refuses them as it does 1e400.
    return json.JSONDecoder(
        object_pairs_hook=_once, parse_int=integer, parse_float=real, parse_constant=real if finite else float
    )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise MalformedError(f"malformed JSON: the key {name!r} occurs twice")
            seen.add(name)
    return found


def _members(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _too_deep() -> MalformedError:
    return MalformedError(f"malformed JSON: nested too deeply; allowed: {DEPTH} levels")
