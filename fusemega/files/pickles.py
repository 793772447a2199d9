"""Reads pickles from any source without running anything, and within limits set by their own size.

A pickle is a program. Here only the opcodes that plain records need are allowed. It may name only what its reader
allows, may not use a memo index beyond its own length (C Python's reader would allocate up to there), and may use only
text, numbers and records as keys of a mapping (hashing nested tuples can take for ever). A pickle that passes may be
given to a faster reader.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar

from fusemega.errors import UserError
from fusemega.files.opening import MIB, read_bytes

PICKLE_BYTES = 256 * MIB
_ALLOWED = """
    PROTO FRAME STOP MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET POP POP_MARK
    NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINUNICODE BINUNICODE SHORT_BINBYTES
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS
    GLOBAL STACK_GLOBAL NEWOBJ REDUCE BUILD
""".split()  # noqa: SIM905


class Record:
    """Stands for a class whose code is not run: its attributes are the instance's state in the pickle."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


# The implementation in Python, because its table of opcodes can be replaced; the one in C takes half the time.
_PYTHON: Any = pickle._Unpickler


class _Unpickler(_PYTHON):
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        code: _PYTHON.dispatch[code] for code in (getattr(pickle, name)[0] for name in _ALLOWED)
    }

    def __init__(self, content: bytes, names: Callable[[str, str], Any]) -> None:
        super().__init__(io.BytesIO(content))
        self._size, self._names = len(content), names

    def find_class(self, module: str, name: str) -> Any:
        return self._names(module, name)

    def _setitem(self) -> None:
        self._check_key(self.stack[-2])
        super().load_setitem()

    def _setitems(self) -> None:
        items = self.stack  # those since the last mark
        for key in items[::2]:
            self._check_key(key)
        super().load_setitems()

    def _long_binput(self) -> None:
        place = int.from_bytes(self.read(4), "little")
        if place > self._size:
            raise pickle.UnpicklingError(f"place {place} of a memo, in {self._size} bytes")
        self.memo[place] = self.stack[-1]

    @staticmethod
    def _check_key(key: object) -> None:
        if not isinstance(key, str | int | Record):
            raise pickle.UnpicklingError(f"a {type(key).__name__} as a key")

    dispatch[pickle.SETITEM[0]] = _setitem
    dispatch[pickle.SETITEMS[0]] = _setitems
    dispatch[pickle.LONG_BINPUT[0]] = _long_binput


def read_pickle(path: str | Path, names: Callable[[str, str], Any], what: str) -> Any:
    """The value of a pickle.

    Args:
        names: returns what a (module, name) in the pickle stands for: `Record`, or a harmless function or value. It
            raises UnpicklingError where the name is not allowed.
        what: what the file should be, for the message: "an index of ...".

    Raises:
        UserError: it cannot be read, is no such pickle, or has a name or an opcode that is not allowed, which is
            not executed.
    """
    content = read_bytes(path, PICKLE_BYTES)
    try:
        return _Unpickler(content, names).load()
    except KeyError as error:  # from `dispatch`, which lacks all other opcodes
        raise UserError(f"{path}: not {what}: it has an opcode or a value that is not allowed ({error})") from None
    except Exception as error:  # invalid pickles raise any of a dozen exception types
        raise UserError(f"{path}: not {what}: {first_line(error)}") from None


def load_torch(source: str | Path | IO[bytes]) -> Any:
    """Loads what `torch.save` wrote, without data (tensors on the device `meta`), with torch's restricted reader.

    Raises:
        pickle.UnpicklingError: it is damaged, or names something that no tensor needs.
    """
    import torch

    try:
        return torch.load(source, map_location="meta", weights_only=True)
    except Exception as error:
        raise pickle.UnpicklingError(str(error) or type(error).__name__) from None


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
