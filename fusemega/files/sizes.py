"""Sizes of files, as users write them. Imports nothing heavy, so that a mistake is reported at once."""

from __future__ import annotations

import re

from fusemega.errors import UserError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(what: str, text: str) -> int:
    """Bytes of a size such as 500MB or 5GB (decimal units, as in transformers).

    Raises:
        UserError: not such a size; it names `what`.

    >>> parse_size("--max-shard-size", "5 GB")
    5000000000
    """
    match = re.fullmatch(r"(\d+)\s*(KB|MB|GB)", text.strip(), re.IGNORECASE)
    if match is None or int(match[1]) == 0:
        raise UserError(f"{what}: found {text!r}; expected a number of KB, MB or GB, such as 5GB")
    return int(match[1]) * _UNITS[match[2].upper()]
