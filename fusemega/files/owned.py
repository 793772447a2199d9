"""Removes and replaces only what fusemega made; marks in the folders themselves prove it.

A temporary folder `.NAME.incomplete` has a marker from its first moment to its last. A folder that may be replaced (a
report) has a list of its files with their hashes: a file that is not in the list, or was changed, belongs to somebody
else. For a link, a note beside it records its target: a link to another target was set by somebody else.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path

from fusemega.errors import UserError
from fusemega.files.integrity import file_hash
from fusemega.files.json_files import read_json

MARKER = ".fusemega"
LIST = "fusemega-files.json"
_SAYS = "temporary, of fusemega\n"


def scratch_of(path: str | Path) -> Path:
    """The temporary folder in which the output `path` is made; on the same file system, links resolved."""
    real = Path(os.path.realpath(path))
    return real.with_name(f".{real.name}.incomplete")


def is_scratch(place: Path) -> bool:
    """Whether a temporary folder of ours is there. One that was just made, and is still empty, counts."""
    if place.is_symlink() or not place.is_dir():
        return False
    marker = place / MARKER
    if marker.is_file() and not marker.is_symlink():
        return marker.stat().st_size == len(_SAYS) and marker.read_text("utf-8", "replace") == _SAYS
    return not any(place.iterdir())


def check_scratch(place: Path) -> None:
    """Refuses to go on where somebody else's file or folder has a temporary folder's name.

    Raises:
        UserError: names it.
    """
    if os.path.lexists(place) and not is_scratch(place):
        raise UserError(f"{place}: exists and was not made by fusemega, which would write there; move it away")


def mark_scratch(place: Path) -> None:
    """Makes a temporary folder, or takes over what a killed process left of one.

    Raises:
        UserError: see `check_scratch`.
    """
    check_scratch(place)
    place.mkdir(parents=True, exist_ok=True)
    (place / MARKER).write_text(_SAYS, encoding="utf-8")


def drop_scratch(place: Path) -> None:
    """Removes a temporary folder if it is ours, and nothing else."""
    if not os.path.lexists(place) or not is_scratch(place):
        return
    # The marker goes last: what a kill in the middle leaves is still known as ours, and can be removed later.
    for inner in place.iterdir():
        if inner.name != MARKER:
            _remove(inner)
    (place / MARKER).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # a writer that outlived its parent has added something
        place.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_list(folder: Path, kind: str) -> None:
    """Lists the files of a finished folder, so that `check_replaceable` knows them again."""
    files = {path.name: file_hash(path) for path in sorted(folder.iterdir())}
    (folder / LIST).write_text(json.dumps({"fusemega": kind, "files": files}, indent=1) + "\n", encoding="utf-8")


def check_replaceable(folder: Path, kind: str, inputs: Iterable[Path] = ()) -> None:
    """Whether `folder` may be written: it is absent, empty, or holds what `write_list` listed and nothing else.

    Args:
        folder: the output.
        kind: what the folder is, as given to `write_list`.
        inputs: what is read; an output that is one of them, or above one, is refused.

    Raises:
        UserError: names what stands in the way.
    """
    real = Path(os.path.realpath(folder))
    for inner, what in [(Path.cwd(), "the current folder"), *((Path(os.path.realpath(i)), str(i)) for i in inputs)]:
        if real == inner or real in inner.parents:
            raise UserError(f"{folder}: is {what}, or above it, and is not replaced; choose another folder")
    if not os.path.lexists(real):
        return
    if not real.is_dir():
        raise UserError(f"{folder}: exists and is not a {kind}; choose another folder")
    found = {path.name: path for path in real.iterdir()}
    listing = found.pop(LIST, None)
    if listing is None:
        if found:
            raise UserError(f"{folder}: exists and is not a {kind} ({LIST} is not in it); choose another folder")
        return
    said = read_json(listing)
    files = said.get("files")
    if said.get("fusemega") != kind or not isinstance(files, dict):
        raise UserError(f"{listing}: not the list of a {kind}'s files; choose another folder")
    for name, path in sorted(found.items()):
        if name not in files:
            raise UserError(f"{path}: not a file of the {kind} in {folder}, which would be replaced; move it away")
        if path.is_symlink() or not path.is_file() or file_hash(path) != files[name]:
            raise UserError(f"{path}: was changed after the {kind} in {folder} was written; move it away")


def remove_listed(folder: Path) -> None:
    """Removes a folder that `check_replaceable` has passed; a file that has come since stays, with an error."""
    if (folder / LIST).exists():
        for name in read_json(folder / LIST)["files"]:
            (folder / name).unlink(missing_ok=True)
        (folder / LIST).unlink()
    folder.rmdir()


def replace_link(place: Path, target: Path) -> None:
    """Makes `place` a link to `target`. Replaces a link only if this function made it; `place` is never absent then.

    Raises:
        UserError: something else is there.
    """
    note = place.with_name(f".{place.name}.fusemega-link")
    before = os.readlink(place) if place.is_symlink() else None
    if before == str(target):
        return
    known = note.read_text("utf-8", "replace").splitlines() if note.is_file() else []
    if os.path.lexists(place) and before not in known:
        raise UserError(f"{place}: exists and was not made by fusemega, which would put a link there; move it away")
    place.parent.mkdir(parents=True, exist_ok=True)
    # The note names both targets, because a kill may come before the rename.
    note.write_text(f"{before}\n{target}\n", encoding="utf-8")
    made = place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")
    made.symlink_to(target)
    os.replace(made, place)  # a link cannot be changed in place, and removing it first would leave a gap
