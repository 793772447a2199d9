"""The values of a run file: `a.b=c` laid over them, and `${section.key}` replaced by what stands there.

There is no other reference: none to the environment, to files, or to a piece of code. A run file is often someone
else's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fusemega.errors import UserError, nearest
from fusemega.files.yaml_files import MalformedYamlError, parse_yaml

_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
_PLACE = re.compile(r"\w[\w-]*(\.\w[\w-]*)*")
_LOOKED_UP = 10_000
_CHARACTERS = 1 << 16


def with_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `values` with overrides of the form `a.b=c`; mappings are merged, everything else is replaced.

    Raises:
        UserError: malformed, or a key inside a list.

    >>> with_overrides({"optimizer": {"lr": 1e-4, "clip_grad": 1.0}}, ["optimizer.lr=5.0e-5", "data.limit=10"])
    {'optimizer': {'lr': 5e-05, 'clip_grad': 1.0}, 'data': {'limit': 10}}
    """
    for text in overrides:
        key, equals, value = text.partition("=")
        parts = key.split(".")
        if not equals or not all(parts):
            raise UserError(f"override {text!r}: expected key=value, such as training.lr=1e-5")
        try:
            given = parse_yaml(value)
        except MalformedYamlError as error:
            raise UserError(f"override {text!r}: malformed value: {error}") from None
        for part in reversed(parts):
            given = {part: given}
        values = _laid_over(values, given, text)
    return values


def resolved(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with every reference replaced. A text that is only a reference becomes the value itself, of any type.

    Raises:
        UserError: a reference to a missing key or to itself, of another form, or with a result that is too large.

    >>> resolved({"data": {"seq_length": 512}, "evaluation": {"seq_length": "${data.seq_length}"}})
    {'data': {'seq_length': 512}, 'evaluation': {'seq_length': 512}}
    """
    resolver = _Resolver(values)
    return {key: resolver.value(value, key, ()) for key, value in values.items()}


def _laid_over(below: Any, above: dict[str, Any], text: str) -> dict[str, Any]:
    if isinstance(below, list):
        raise UserError(f"override {text!r}: a key inside a list; give the whole list")
    out = dict(below) if isinstance(below, dict) else {}
    for key, value in above.items():
        out[key] = _laid_over(out.get(key), value, text) if isinstance(value, dict) else value
    return out


class _Resolver:
    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._left = _LOOKED_UP

    def value(self, value: Any, at: str, following: tuple[str, ...]) -> Any:
        """`value`, which stands at the key path `at`, reached through the references `following`."""
        if isinstance(value, dict):
            return {key: self.value(inner, f"{at}.{key}", following) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.value(inner, f"{at}.{i}", following) for i, inner in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value
        if whole := _REFERENCE.fullmatch(value):
            return self._referred(whole[1], at, following)
        if "${" in _REFERENCE.sub("", value):
            raise UserError(f"{at}: {value!r}: a reference is ${{section.key}}, with no other inside")
        out = _REFERENCE.sub(lambda match: self._part(match[1], at, following), value)
        if len(out) > _CHARACTERS:
            raise UserError(f"{at}: its references make a text of more than {_CHARACTERS} characters")
        return out

    def _part(self, place: str, at: str, following: tuple[str, ...]) -> str:
        found = self._referred(place, at, following)
        if isinstance(found, bool) or not isinstance(found, str | int | float):
            raise UserError(f"{at}: ${{{place}}} is {found!r}, which cannot be part of a text")
        return str(found)

    def _referred(self, place: str, at: str, following: tuple[str, ...]) -> Any:
        self._left -= 1
        if self._left < 0:
            raise UserError(f"{at}: more than {_LOOKED_UP} references, counted as often as they are used")
        if not _PLACE.fullmatch(place):
            raise UserError(f"{at}: ${{{place}}}: only ${{section.key}}, another value of the file, can be referred to")
        if place in following:
            raise UserError(f"{at}: ${{{place}}} refers to itself")
        found: Any = self._root
        for part in place.split("."):
            inside = found if isinstance(found, dict) else dict(enumerate(found)) if isinstance(found, list) else {}
            key = int(part) if isinstance(found, list) and part.isdecimal() and len(part) < 9 else part
            if key not in inside:
                raise UserError(f"{at}: ${{{place}}}: no such key{nearest(part, inside)}")
            found = inside[key]
        return self.value(found, place, (*following, place))
