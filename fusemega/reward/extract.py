"""The code in a response."""

from __future__ import annotations

import re

_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([^\n`]*)\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_PYTHON = ("", "py", "python", "python3")


def code_of(response: str, entry_point: str | None = None) -> str:
    """The code in a response: its last Python block that defines `entry_point`, else its last one; without blocks, all.

    What a reasoning model has thought, up to the last `</think>`, is no answer. A block is fenced by ``` or ~~~, with
    python, py or nothing after it; where there are only others, these are taken. One without an end goes on to the end.

    >>> code_of("Here:\\n```python\\nx = 1\\n```\\nDone.")
    'x = 1\\n'
    """
    response = response.rpartition("</think>")[2]
    blocks = [(label.strip().lower(), code) for _, label, code in _FENCE.findall(response)]
    codes = [code for label, code in blocks if label in _PYTHON] or [code for _, code in blocks]
    if not codes:
        return response
    return next((code for code in reversed(codes) if defines(code, entry_point)), codes[-1])


def defines(code: str, entry_point: str | None) -> bool:
    """Whether the code has a function, class or variable with the name with which `entry_point` begins."""
    name = re.match(r"\w+", entry_point or "")
    if name is None:
        return False
    return bool(
        re.search(rf"^(?:(?:async[ ]+)?def|class)[ ]+{name[0]}\b|^{name[0]}[ ]*(?::[^=]+)?=", code, re.MULTILINE)
    )
