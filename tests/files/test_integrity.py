"""The integrity manifest: every kind of damage is found, by the cheap check or by the thorough one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import xxhash

from fusemega.errors import UserError
from fusemega.files import integrity


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.bin").write_bytes(b"a" * 5000)
    (tmp_path / "sub" / "b.bin").write_bytes(b"b" * 70)
    (tmp_path / "empty").write_bytes(b"")
    integrity.write_integrity(tmp_path)
    return tmp_path


def test_an_untouched_folder_passes(folder: Path) -> None:
    integrity.check_sizes(folder)
    assert integrity.damaged_files(folder) == []
    assert integrity.recorded_hashes(folder) == {
        "a.bin": xxhash.xxh3_128(b"a" * 5000).hexdigest(),
        "empty": xxhash.xxh3_128(b"").hexdigest(),
        "sub/b.bin": xxhash.xxh3_128(b"b" * 70).hexdigest(),
    }


def test_files_above_the_buffer_are_hashed_whole(tmp_path: Path) -> None:
    data = bytes(range(256)) * (3 << 14)  # 12 MiB
    (tmp_path / "large").write_bytes(data + b"tail")
    assert integrity.file_hash(tmp_path / "large") == xxhash.xxh3_128(data + b"tail").hexdigest()


def test_a_flipped_bit_is_found_by_the_hash_alone(folder: Path) -> None:
    data = bytearray((folder / "sub" / "b.bin").read_bytes())
    data[33] ^= 4
    (folder / "sub" / "b.bin").write_bytes(data)
    integrity.check_sizes(folder)
    assert integrity.damaged_files(folder) == ["sub/b.bin"]


def test_processes_share_the_reading(folder: Path) -> None:
    for name in ("a.bin", "sub/b.bin"):
        (folder / name).write_bytes(b"x" * (folder / name).stat().st_size)
    shares = [integrity.damaged_files(folder, share=(rank, 3)) for rank in range(3)]
    assert shares == [["a.bin"], [], ["sub/b.bin"]]


@pytest.mark.parametrize(("size", "state"), [(4999, "truncated: 4999 bytes"), (5001, "too long: 5001 bytes")])
def test_another_size_is_refused(folder: Path, size: int, state: str) -> None:
    (folder / "a.bin").write_bytes(b"a" * size)
    for check in (integrity.check_sizes, integrity.damaged_files):
        with pytest.raises(UserError, match=f"a.bin: {state}, and integrity.json says 5000"):
            check(folder)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "empty").unlink()
    with pytest.raises(UserError, match="empty: listed in integrity.json, but cannot be read: No such file"):
        integrity.check_sizes(folder)


def test_hashes_that_are_known_are_not_taken_again(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"2")
    integrity.write_integrity(tmp_path, {"a": "as told"})
    assert integrity.recorded_hashes(tmp_path) == {"a": "as told", "b": xxhash.xxh3_128(b"2").hexdigest()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "integrity.json: cannot read: No such file"),
        ("{", "integrity.json:1: malformed JSON"),
        ("[]", "integrity.json: expected a JSON object, found a list"),
        ('{"format": "fusemega-integrity-1"}', "not an integrity manifest"),
        ('{"format": "other"}', "format is 'other', expected 'fusemega-integrity-1'"),
    ],
)
def test_a_manifest_that_cannot_be_used(folder: Path, text: str | None, message: str) -> None:
    (folder / "integrity.json").unlink()
    if text is not None:
        (folder / "integrity.json").write_text(text)
    with pytest.raises(UserError, match=message):
        integrity.check_sizes(folder)


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "sub/../../x"])
def test_a_manifest_does_not_lead_out_of_its_folder(folder: Path, name: str) -> None:
    manifest = json.loads((folder / "integrity.json").read_text())
    manifest["files"][name] = {"size": 1, "xxh3_128": "0"}
    (folder / "integrity.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="names a file outside the folder"):
        integrity.damaged_files(folder)
