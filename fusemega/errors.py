"""The exception for mistakes that a user can correct, and helpers for its message."""

from __future__ import annotations

import difflib
import errno
import os
import unicodedata
from collections.abc import Iterable

LONGEST = 4000  # characters of a message
_NAMES = "ENAMETOOLONG ELOOP EACCES EPERM EROFS ENOSPC EDQUOT EFBIG ENOTDIR EMFILE"
_OF_THE_SYSTEM = frozenset(getattr(errno, name) for name in _NAMES.split())


class UserError(Exception):
    """A mistake that the user can correct: in a file, a row, a key, a layout.

    The message is one line that names the file, row or key, what was found and what is allowed.
    Commands print it without a traceback and exit with status 2. Line breaks in a library's message become spaces.
    """

    def __init__(self, message: str) -> None:
        line = printable(" ".join(line.strip() for line in message.splitlines()))
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}")


class Retryable(UserError):
    """An error that the same command may not meet again: a batch script may try it again. The exit status is 1."""


def of_the_system(error: Exception) -> UserError | None:
    """The error for a path that the operating system refuses: a name too long, no permission, a full disk.

    Readers and writers give a better message themselves; this covers the other cases. A missing or an existing file is
    not included, because it may be a bug of fusemega.
    """
    if not isinstance(error, OSError) or error.errno not in _OF_THE_SYSTEM:
        return None
    name = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return UserError(f"{name}{error.strerror}")


def printable(text: str) -> str:
    """`text` for a terminal: line ends and tabs stay; other control characters, and characters that change the writing
    direction or have no glyph, are escaped as Python does.

    >>> printable("a\\x1b[2J")
    'a\\\\x1b[2J'
    """
    if text.isprintable():
        return text
    return "".join(
        c if c in "\n\t" or c.isprintable() or unicodedata.category(c) == "Zs" else _escaped(c) for c in text
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def nearest(name: object, allowed: Iterable[object]) -> str:
    """A hint for a misspelt name: " (did you mean 'x'?)", or "" if no valid name is near.

    Args:
        name: the name that was given.
        allowed: the valid names.

    >>> nearest("bf61", ["bf16", "fp32"])
    " (did you mean 'bf16'?)"
    """
    hits = difflib.get_close_matches(str(name), [str(a) for a in allowed], n=1, cutoff=0.6)
    return f" (did you mean {hits[0]!r}?)" if hits else ""


def choose(what: str, name: str, allowed: Iterable[str]) -> str:
    """Returns `name` if it is one of `allowed`, else raises UserError with the nearest valid name."""
    names = sorted(allowed)
    if name not in names:
        raise UserError(f"{what}: unknown name {name!r}{nearest(name, names)}; allowed: {', '.join(names)}")
    return name
