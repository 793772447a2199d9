"""Reads YAML files from any source, with limits: plain values under text keys, of limited number, depth and length.

A file of a few lines can expand to more than a machine holds, by aliases of aliases. So values are counted while they
are built, each time they are used. The types are those of JSON: a date is text, `1e-5` a number, and a tag of any other
type is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from fusemega.errors import UserError
from fusemega.files.opening import MIB, read_text

FILE_BYTES = MIB // 4  # PyYAML takes up to 20 microseconds a byte
DEPTH = 50
VALUES = 100_000
DIGITS = 20  # of the longest 64-bit integers, with a sign

_TAG = "tag:yaml.org,2002:"
_WORDS = {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+")
_EXPONENT = r"[eE][-+]?[0-9]+"
_FLOAT = re.compile(
    rf"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:{_EXPONENT})?|\.[0-9][0-9_]*(?:{_EXPONENT})?|[0-9][0-9_]*{_EXPONENT})"
)
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
# Characters that no file name, no text for a model and no terminal needs.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


class _Loader(yaml.SafeLoader):
    """Composes nodes only: a node's tag says its type, and `_Builder` makes the value."""

    # Numbers are added below, with patterns of our own: PyYAML's integers may be octal or sexagesimal, and it reads
    # 1e-5 as text. Dates are left out.
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if tag.removeprefix(_TAG) in ("null", "bool", "merge")]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


for _kind, _pattern in (("int", _INTEGER), ("float", _FLOAT), ("float", _NOT_FINITE)):
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(f"(?:{_pattern.pattern})$"), list("-+0123456789."))


class MalformedYamlError(ValueError):
    """The text is not YAML, or exceeds a limit. The message says what is wrong, but not in which file.

    Attributes:
        line: counted from 1, where it is known.
    """

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


def parse_yaml(text: str) -> Any:
    """The value of one YAML document: None, bool, int, float, str, and lists and mappings (of str keys) of these.

    Raises:
        MalformedYamlError: the text is not YAML, or exceeds a limit.
    """
    try:
        node = yaml.compose(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise MalformedYamlError(str(getattr(error, "problem", None) or error), mark and mark.line + 1) from None
    except RecursionError:
        raise MalformedYamlError(f"nested too deeply; allowed: {DEPTH} levels") from None
    except (ValueError, OverflowError) as error:  # an escape such as "\\UFFFFFFFF"
        raise MalformedYamlError(str(error)) from None
    return None if node is None else _Builder().value(node, 0)


def read_yaml_file(path: str | Path, what: str = "") -> Any:
    """The value of a file; None where it is empty.

    Raises:
        UserError: it cannot be read, or is malformed; names the line.
    """
    text = read_text(path, FILE_BYTES, what)
    try:
        return parse_yaml(text)
    except MalformedYamlError as error:
        raise UserError(f"{path}{f':{error.line}' if error.line else ''}: malformed YAML: {error}") from None


class _Builder:
    def __init__(self) -> None:
        self._left = VALUES

    def value(self, node: yaml.Node, depth: int) -> Any:
        self._left -= 1
        if self._left < 0:
            raise self._wrong(node, f"has more than {VALUES} values, with aliases or without")
        if depth > DEPTH:
            raise self._wrong(node, f"nested too deeply, or in itself; allowed: {DEPTH} levels")
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, depth)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.value(item, depth + 1) for item in node.value]
        if isinstance(node, yaml.ScalarNode) and kind in ("null", "bool", "int", "float", "str"):
            return self._scalar(node, kind)
        if kind == "merge":
            raise self._wrong(node, "<< is a key, and no value")
        raise self._wrong(node, f"the tag {node.tag!r} means nothing here")

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        seen = set()
        for key, value in node.value:
            name = self._key(key)
            if name in seen:
                raise self._wrong(key, f"the key {name!r} occurs twice")
            seen.add(name)
            if key.tag != _TAG + "merge":
                own[name] = self.value(value, depth + 1)
                continue
            for found in self._merged(value, depth + 1):
                merged = found | merged  # of several, the first counts
        return merged | own

    def _merged(self, node: yaml.Node, depth: int) -> Iterator[dict[str, Any]]:
        value = self.value(node, depth)
        for found in value if isinstance(value, list) else [value]:
            if not isinstance(found, dict):
                raise self._wrong(node, f"<< takes mappings, found a {type(found).__name__}")
            yield found

    def _key(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise self._wrong(node, "a key is a word, found a list or a mapping")
        if node.tag not in (_TAG + "str", _TAG + "merge"):
            raise self._wrong(node, f"a key is a word, found {_short(node.value)}; in quotes it would be one")
        return str(self._text(node))

    def _scalar(self, node: yaml.ScalarNode, kind: str) -> Any:
        text = node.value
        if kind == "str":
            return self._text(node)
        if kind == "null":
            return None
        if kind == "bool" and text.lower() in _WORDS:
            return _WORDS[text.lower()]
        if kind == "int" and _INTEGER.fullmatch(text):
            if len(text) > DIGITS:
                raise self._wrong(node, f"a number of {len(text)} digits; allowed: {DIGITS}")
            number = int(text.replace("_", ""), 16 if text.startswith("0x") else 10)
            if not -(1 << 63) <= number < 1 << 63:
                raise self._wrong(node, f"{text} is not a 64-bit integer")
            return number
        if kind == "float" and _NOT_FINITE.fullmatch(text):
            return float(text.replace(".", "").lower())
        if kind == "float" and (_FLOAT.fullmatch(text) or _INTEGER.fullmatch(text)) and not text.startswith("0x"):
            value = float(text.replace("_", ""))
            if not math.isfinite(value):
                raise self._wrong(node, f"{_short(text)} is larger than any number of 64 bits")
            return value
        names = {"bool": "yes or no", "int": "an integer", "float": "a number"}
        raise self._wrong(node, f"{_short(text)} is not {names[kind]}, as its tag says")

    def _text(self, node: yaml.ScalarNode) -> str:
        if found := _CONTROL.search(node.value):
            raise self._wrong(node, f"a text with the character U+{ord(found[0]):04X}, which none may have")
        return str(node.value)

    @staticmethod
    def _wrong(node: yaml.Node, reason: str) -> MalformedYamlError:
        return MalformedYamlError(reason, node.start_mark.line + 1)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
