"""Values of plain data, as bytes on a pipe.

JSON, in which an object has one key, the kind of a value that JSON lacks: {"tuple": [1, 2]}. Reading makes plain data
and nothing else, whoever has written it: no object with a comparison of its own, as pickle would.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

LONGEST = 16 << 20  # bytes of a message
_DIGITS = 1 << 53


class NotPlain(Exception):
    """A value of another type, named."""


class TooLong(Exception):
    """A message of more than `LONGEST` bytes."""


def send(pipe: int, message: Any) -> None:
    """Writes a JSON-able message."""
    content = json.dumps(message).encode()
    if len(content) > LONGEST:
        raise TooLong
    left = memoryview(len(content).to_bytes(8, "little") + content)
    while left:
        left = left[os.write(pipe, left) :]


def receive(pipe: int) -> Any:
    """The next message.

    Raises:
        EOFError: there is none.
        TooLong, ValueError: it is too long, or malformed.
    """
    length = int.from_bytes(_exactly(pipe, 8), "little")
    if length > LONGEST:
        raise TooLong
    return json.loads(_exactly(pipe, length))


def packed(value: Any) -> Any:
    """`value` as JSON-able data.

    Raises:
        NotPlain: it is, or holds, something else than data, or nests too deeply.
    """
    try:
        return _packed(value)
    except RecursionError:
        raise NotPlain("data nested too deeply") from None


def unpacked(value: Any) -> Any:
    """What `packed` was given.

    Raises:
        NotPlain: `packed` would not have made it.
    """
    try:
        return _unpacked(value)
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError):
        raise NotPlain("malformed data") from None


def _packed(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        number = int.__index__(value)
        return number if -_DIGITS < number < _DIGITS else {"int": hex(number)}
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytearray" if isinstance(value, bytearray) else "bytes": value.hex()}
    if isinstance(value, range):
        return {"range": [_packed(value.start), _packed(value.stop), _packed(value.step)]}
    if isinstance(value, dict):
        return {"dict": [[_packed(key), _packed(item)] for key, item in dict.items(value)]}
    if isinstance(value, list):
        return [_packed(item) for item in list.__iter__(value)]
    kinds: tuple[Any, ...] = (tuple, set, frozenset)
    for kind in kinds:
        if isinstance(value, kind):
            return {kind.__name__: [_packed(item) for item in kind.__iter__(value)]}
    if isinstance(value, Iterator):
        return {"iterator": [_packed(item) for item in value]}
    if type(value).__module__ == "numpy":
        return _packed(value.tolist())
    raise NotPlain(type(value).__name__)


_MAKE: dict[str, Any] = {
    "int": lambda text: int(text, 16),
    "complex": lambda parts: complex(*parts),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "range": lambda parts: range(*map(_unpacked, parts)),
    "dict": lambda pairs: {_unpacked(key): _unpacked(item) for key, item in pairs},
    "tuple": lambda items: tuple(map(_unpacked, items)),
    "set": lambda items: set(map(_unpacked, items)),
    "frozenset": lambda items: frozenset(map(_unpacked, items)),
    "iterator": lambda items: iter(list(map(_unpacked, items))),
}


def _unpacked(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpacked(item) for item in value]
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        return _MAKE[kind](content)
    return value


def _exactly(pipe: int, length: int) -> bytes:
    parts = []
    while length:
        part = os.read(pipe, min(length, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
