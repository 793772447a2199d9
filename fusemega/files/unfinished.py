"""Outputs that take long: written under a temporary name with a journal, resumed from it, renamed when complete.

.OUT.incomplete/
  .fusemega        marks the folder as ours (`owned.py`)
  journal.jsonl    a line of JSON with the identity of the output; then a line for each finished item
  out/             the output's files, complete or not; renamed to OUT
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from fusemega.errors import UserError
from fusemega.files.json_files import LINES_BYTES, read_lines
from fusemega.files.lock import locked
from fusemega.files.opening import read_bytes
from fusemega.files.output import INSIDE, check_room, check_writable, disk_errors, publish, refuse_existing
from fusemega.files.owned import check_scratch, drop_scratch, mark_scratch, scratch_of

_JOURNAL = "journal.jsonl"


class Unfinished:
    """An output that is being made.

    Attributes:
        folder: where it is written.
        finished: results of the finished items, by name; those of an interrupted call come from the journal.
    """

    def __init__(self, folder: Path, finished: dict[str, Any], journal: TextIO) -> None:
        self.folder = folder
        self.finished = finished
        self._journal = journal

    def record(self, name: str, result: Any) -> None:
        """Notes in the journal that an item, whose bytes are on disk, need not be made again. `result` is JSON-able."""
        self._journal.write(json.dumps([name, result]) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self.finished[name] = result


@contextmanager
def unfinished_folder(
    path: Path, identity: Mapping[str, Any], resume: bool, needed_bytes: int, say: Callable[[str], None]
) -> Iterator[Unfinished]:
    """The folder to write into; it becomes `path` when the block ends well, and stays, for `resume`, when it does not.

    Args:
        path: absent, or an empty folder.
        identity: everything that the output's bytes depend on (JSON-able). An output begun with another is refused.
        resume: continue from what an interrupted call has left, if anything; otherwise it is deleted.
        needed_bytes: size of the whole output; the call is refused at once when the disk has less room.
        say: called with a line about what is kept when the block does not end well.

    Raises:
        UserError: `path` is not empty or cannot be made, what is there was begun with another `identity`, or the disk
            is full. Where no item has been finished, nothing is left behind.
    """
    refuse_existing(path)
    check_writable(path)
    place = scratch_of(path)
    folder = place / INSIDE
    with locked(path), disk_errors(path):
        refuse_existing(path)  # another process may have finished it meanwhile
        check_scratch(place)
        if resume and (place / _JOURNAL).exists() and folder.exists():
            finished = _read_journal(place / _JOURNAL, identity)
        else:
            finished = {}
            drop_scratch(place)
            mark_scratch(place)
            folder.mkdir()
        # st_blocks (always of 512 bytes) is what the disk has allocated; a length would count holes before items that
        # were written out of order.
        present = sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())
        try:
            check_room(path, folder, needed_bytes - present)
        except UserError:
            if not finished:
                drop_scratch(place)
            raise
        with open(place / _JOURNAL, "a", encoding="utf-8") as journal:
            if not finished:
                journal.truncate(0)
                journal.write(json.dumps(identity) + "\n")
            unfinished = Unfinished(folder, finished, journal)
            try:
                yield unfinished
            except BaseException:
                if unfinished.finished:
                    say(f"{place}: keeps the {len(unfinished.finished)} finished parts; --resume continues from there")
                else:
                    drop_scratch(place)
                raise
        publish(folder, Path(os.path.realpath(path)))
        drop_scratch(place)


def _read_journal(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The journal's items. Half a line that a killed process left at the end is also removed from the file."""
    lines, torn = read_lines(path, finite=False)
    if not lines:
        return {}
    if lines[0][1] != json.loads(json.dumps(identity)):  # as JSON gives it back: tuples become lists
        raise UserError(
            f"{path.parent}: was started from other files or with other options, so it cannot be resumed; "
            f"leave --resume out to start again"
        )
    for number, item in lines[1:]:
        if not isinstance(item, list) or len(item) != 2 or not isinstance(item[0], str):
            raise UserError(f"{path}:{number}: not an entry of a journal; leave --resume out to start again")
    if torn:
        content = read_bytes(path, LINES_BYTES)
        os.truncate(path, content.rfind(b"\n") + 1)
    return {name: result for _, (name, result) in lines[1:]}
