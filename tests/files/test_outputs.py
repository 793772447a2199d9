"""Outputs: one writer at a time, and nothing is removed or replaced that is not our own."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fusemega.align.vocabulary_map import VocabularyMap
from fusemega.errors import UserError
from fusemega.files import integrity
from fusemega.files.lock import locked
from fusemega.files.output import new_file, new_folder, write_durably
from fusemega.files.owned import MARKER, check_replaceable, remove_listed, replace_link, write_list
from fusemega.files.unfinished import unfinished_folder


def _in_a_child(action: Callable[[], object]) -> str:
    """The UserError that `action` raises in a forked process, or ""."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except UserError as error:
            os.write(writer, str(error).encode())
            os._exit(2)
        finally:
            os._exit(9)
    os.close(writer)
    with os.fdopen(reader) as said:
        text = said.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (2 if text else 0)
    return text


def _take(path: Path) -> None:
    with locked(path):
        pass


@pytest.mark.parametrize("spelling", ["out", "out/", "sub/../out", "link"])
def test_the_second_writer_is_told_who_the_first_is(tmp_path: Path, spelling: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with locked(tmp_path / "out"), locked(tmp_path / "out"):
        said = _in_a_child(lambda: _take(Path(f"{tmp_path}/{spelling}")))
    assert f"another process is writing it (process {os.getpid()} on {socket.gethostname()})" in said
    assert _in_a_child(lambda: _take(tmp_path / "out")) == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "sub"]


def test_a_killed_holder_holds_nobody_up(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with locked(tmp_path / "new" / "out"):
            os._exit(0)  # the lock file stays, as after kill -9
    os.waitpid(child, 0)
    assert (tmp_path / "new" / ".out.fusemega.lock").exists()
    _take(tmp_path / "new" / "out")
    assert not any((tmp_path / "new").iterdir())


def test_a_file_in_the_place_of_a_lock_stays(tmp_path: Path) -> None:
    (tmp_path / ".out.fusemega.lock").write_text("mine")
    with pytest.raises(UserError, match="is not a lock of fusemega"):
        _take(tmp_path / "out")
    assert (tmp_path / ".out.fusemega.lock").read_text() == "mine"


def _folder(path: Path) -> None:
    with new_folder(path) as made:
        (made / "a").write_text("a")


def _file(path: Path) -> None:
    with new_file(path) as file:
        file.write("a")


def _long(path: Path) -> None:
    with unfinished_folder(path, {}, False, 1, print) as made:
        (made.folder / "a").write_text("a")


@pytest.mark.parametrize("write", [_folder, _file, _long])
def test_a_leftover_is_taken_over_only_if_it_is_ours(tmp_path: Path, write: Callable[[Path], None]) -> None:
    place = tmp_path / ".out.incomplete"
    place.mkdir()
    (place / "notes").write_text("mine")
    with pytest.raises(UserError, match=r"\.out\.incomplete: exists and was not made by fusemega"):
        write(tmp_path / "out")
    assert (place / "notes").read_text() == "mine" and not (tmp_path / "out").exists()
    (place / MARKER).write_text("temporary, of fusemega\n")
    write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_replaced_holds_what_was_listed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("page")
    with pytest.raises(UserError, match="is not a report"):
        check_replaceable(out, "report")
    write_list(out, "report")
    check_replaceable(out, "report")
    (out / "notes").write_text("mine")
    with pytest.raises(UserError, match="notes: not a file of the report"):
        check_replaceable(out, "report")
    (out / "notes").unlink()
    (out / "report.html").write_text("edited")
    with pytest.raises(UserError, match=r"report\.html: was changed"):
        check_replaceable(out, "report")
    (out / "report.html").write_text("page")
    with pytest.raises(UserError, match="or above it"):
        check_replaceable(out, "report", [out / "run"])
    remove_listed(out)
    assert not out.exists()


def test_a_link_replaces_its_own_alone(tmp_path: Path) -> None:
    place = tmp_path / "models" / "teacher"
    for target in ("a", "a", "b"):
        replace_link(place, tmp_path / target)
        assert os.readlink(place) == str(tmp_path / target)
    assert sorted(path.name for path in place.parent.iterdir()) == [".teacher.fusemega-link", "teacher"]
    place.unlink()
    place.symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="teacher: exists and was not made by fusemega"):
        replace_link(place, tmp_path / "c")
    replace_link(place, tmp_path / "mine")  # nothing is to be done
    assert os.readlink(place) == str(tmp_path / "mine")
    place.unlink()
    place.mkdir()
    with pytest.raises(UserError, match="teacher: exists and was not made by fusemega"):
        replace_link(place, tmp_path / "mine")


def test_a_map_replaces_maps_alone(tmp_path: Path) -> None:
    table = np.zeros(3, dtype=np.int32)
    made = VocabularyMap("exact", "a", "b", table, table, table, len(table), 3, False, False)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: exists and is not a vocabulary map"):
        made.save(tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
    for _ in range(2):
        made.save(tmp_path / "a.map")
    assert len(VocabularyMap.load(tmp_path / "a.map").table_S) == 3


def test_a_small_file_written_anew_leaves_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "a.tmp").write_text("mine")
    write_durably(tmp_path / "a", "text")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.tmp": "mine", "a": "text"}


def test_what_the_manifest_does_not_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    integrity.write_integrity(tmp_path)
    (tmp_path / "b").write_text("b")
    with pytest.raises(UserError, match=r"b: integrity\.json does not list it"):
        integrity.check_sizes(tmp_path)
    with pytest.raises(UserError, match="choose a place outside it"):
        _folder(tmp_path / "out")
    (tmp_path / "integrity.json").write_text('{"format": "fusemega-integrity-1", "files": {}}')
    with pytest.raises(UserError, match="lists no files"):
        integrity.check_sizes(tmp_path)
