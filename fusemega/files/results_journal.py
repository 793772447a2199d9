"""Results of a long command as they are found, so that a killed one goes on where it stopped.

.OUT.incomplete/
  .fusemega        marks the folder as ours (`files/owned.py`)
  journal.jsonl    a line of JSON with what the results depend on; then lines: key -> result
  out              the finished file or folder, before it gets its name

A key says what a result is of (a text's hash), whatever the order, layout or file in which it is asked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from fusemega.errors import UserError
from fusemega.files.json_files import LINES_BYTES, read_lines
from fusemega.files.lock import locked
from fusemega.files.opening import read_bytes
from fusemega.files.output import INSIDE, check_writable, disk_errors, publish, publish_file
from fusemega.files.owned import check_scratch, drop_scratch, mark_scratch, scratch_of

_JOURNAL = "journal.jsonl"


class ResultsJournal:
    """What is known so far.

    Attributes:
        found: key -> result, a list.
        out: the place for the finished file or folder.
    """

    def __init__(self, found: dict[str, list[Any]], out: Path, file: TextIO) -> None:
        self.found, self.out, self._file = found, out, file

    def record(self, found: Mapping[str, Sequence[Any]]) -> None:
        """Adds some results; on disk before the function returns."""
        self._file.write(json.dumps(found) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.found |= {key: list(result) for key, result in found.items()}


def check_no_output(path: Path) -> None:
    """Refuses, before any long work, an output that is there already or cannot be written.

    Raises:
        UserError: names it.
    """
    if os.path.lexists(path):
        raise UserError(f"{path}: exists; nothing is overwritten")
    check_writable(path)


@contextmanager
def results_journal(path: Path, identity: Mapping[str, Any]) -> Iterator[ResultsJournal]:
    """The journal of the output `path`, an earlier call's if it was interrupted. One process; it holds the lock.

    When the block ends well, what it has left in `out` becomes `path`, and the journal is removed. Otherwise it stays.

    Args:
        identity: what the results depend on besides what a key says (JSON-able).

    Raises:
        UserError: the output exists, or was begun with another `identity`; another process writes it; a full disk.
    """
    place = scratch_of(path)
    with locked(path), disk_errors(path):
        check_no_output(path)
        check_scratch(place)
        journal = place / _JOURNAL
        found = _read(journal, identity) if journal.exists() else None
        if found is None:
            drop_scratch(place)
            mark_scratch(place)
        with open(journal, "a", encoding="utf-8") as file:
            if found is None:
                file.write(json.dumps(identity) + "\n")
            yield ResultsJournal(found or {}, place / INSIDE, file)
        publishes = publish if (place / INSIDE).is_dir() else publish_file
        publishes(place / INSIDE, Path(os.path.realpath(path)))
        drop_scratch(place)


def _read(path: Path, identity: Mapping[str, Any]) -> dict[str, list[Any]] | None:
    """The results in a journal; None if not even its first line is whole. Half a line at the end is cut off."""
    lines, torn = read_lines(path, finite=False)
    if not lines:
        return None
    begun = lines[0][1]
    if begun != json.loads(json.dumps(identity)):
        other = [name for name in identity if not isinstance(begun, dict) or begun.get(name) != identity[name]]
        raise UserError(
            f"{path.parent}: begun with another model or settings ({', '.join(other)} differ), so it is not continued; "
            "remove it to start again, or choose another output"
        )
    found: dict[str, list[Any]] = {}
    for number, item in lines[1:]:
        if not isinstance(item, dict) or not all(isinstance(result, list) for result in item.values()):
            raise UserError(f"{path}:{number}: not an entry of a journal; remove {path.parent} to start again")
        found |= item
    if torn:
        content = read_bytes(path, LINES_BYTES)
        os.truncate(path, content.rfind(b"\n") + 1)
    return found
