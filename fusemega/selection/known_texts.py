"""The texts of named sets that prompts are compared with: rows of any usual shape, of which the question is taken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fusemega.errors import UserError
from fusemega.selection.run_file import NamedSet
from fusemega.text.data import DataConfig, Source
from fusemega.text.fields import BadRow, content_of

_FIELDS = ("prompt", "question", "instruction", "problem", "text", "messages")


def read_known(sets: Sequence[NamedSet]) -> list[tuple[str, str]]:
    """(name of the set, text) of every row.

    Raises:
        UserError: a file cannot be read; a row has no text in the field (file and row); two sets of one name.
    """
    names = [each.name for each in sets]
    if len(set(names)) < len(names):
        raise UserError(f"decontaminate.against: two sets have one name, of {', '.join(names)}")
    return [(each.name, text) for each in sets for text in _texts(each)]


def _texts(named: NamedSet) -> Iterator[str]:
    source = Source(DataConfig(path=named.path, split=named.split))
    found = False
    for row in source.rows():
        place = f"{source.names[row.file]}:{row.number}"
        try:
            text = _text(row.value, named.field)
        except BadRow as error:
            raise UserError(f"{place}: {error.detail}") from None
        if text.strip():
            found = True
            yield text
    if not found:
        raise UserError(f"{', '.join(source.names)}: the set {named.name!r} of decontaminate.against has no text")


def _text(row: Any, field: str | None) -> str:
    if isinstance(row, BadRow):
        raise row
    if isinstance(row, str) and field is None:
        return row
    present = row if isinstance(row, Mapping) else {}
    name = field or next((name for name in _FIELDS if present.get(name) is not None), None)
    if name is None or present.get(name) is None:
        raise BadRow(
            "no text",
            f"the row has no {field or ', '.join(_FIELDS)}; found the keys {', '.join(map(str, present)) or 'none'}; "
            "name the field with the text in decontaminate.against",
        )
    value = present[name]
    if isinstance(value, list) and all(isinstance(turn, Mapping) and "role" in turn for turn in value):
        return "\n".join(content_of(turn.get("content"), name) for turn in value if turn["role"] == "user")
    return content_of(value, name)
