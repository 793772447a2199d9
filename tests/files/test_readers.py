"""The shared readers: what they take, and the first thing beyond each of their bounds."""

from __future__ import annotations

import json
import os
import pickle
import resource
import socket
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from fusemega.errors import UserError, of_the_system, printable
from fusemega.files import yaml_files
from fusemega.files.json_files import MalformedError, parse_json, read_lines
from fusemega.files.npz_files import MalformedArraysError, read_arrays
from fusemega.files.opening import is_inside, open_regular, read_text, refuse_special_files
from fusemega.files.parquet_files import read_parquet
from fusemega.files.pickles import Record, read_pickle
from fusemega.files.safetensors_header import read_header
from fusemega.files.tokenizer_files import tokenizer_errors
from fusemega.files.yaml_files import MalformedYamlError, parse_yaml
from fusemega.run_values import resolved, with_overrides


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\xef\xbb\xbfa\n")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert read_text(tmp_path / "link") == "a\n"
    with pytest.raises(UserError, match="file: 5 bytes; allowed: 4"):
        read_text(tmp_path / "file", limit=4)
    refuse_special_files(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "socket"))
    for name, words in (
        ("fifo", "fifo: cannot read: a FIFO, not a regular file"),
        ("socket", "socket: cannot read: a socket or device, not a regular file"),
        ("../../../../../../dev/null", "cannot read: a device, not a regular file"),
        (".", "cannot read: Is a directory"),
        ("none", "none: cannot read: No such file"),
        ("n" * 300, "cannot read: File name too long"),
        ("a\0b", r"a\\x00b: cannot read: the path has a character that file names cannot contain"),
    ):
        with pytest.raises(UserError, match=words):
            open_regular(tmp_path / name)
    with pytest.raises(UserError, match="a FIFO|a socket"):
        refuse_special_files(tmp_path)


def test_names_that_stay_inside_a_folder() -> None:
    assert all(map(is_inside, ("a", "a/b.json", "__0_0.distcp", "Modell größe.bin", "x" * 255)))
    wrong = ("", "/a", "a/", "../a", "a/../b", "a//b", "./a", "a\0b", "a\nb", "a\\b", "\ud800", "x" * 256, "ü" * 128)
    assert not any(map(is_inside, wrong))


def test_what_a_terminal_is_shown() -> None:
    assert printable("Größe 3\u00a0m:\tñ 日本\n") == "Größe 3\u00a0m:\tñ 日本\n"
    assert printable("a\x1b[2Jb\x07\u202ec\ud800\x9b\r") == r"a\x1b[2Jb\x07\u202ec\ud800\x9b\r"
    assert str(UserError("x\x1b[31m\ny")) == r"x\x1b[31m y"
    long = str(UserError("a" * 10_000 + "b"))
    assert len(long) == 4005 and long.endswith("ab") and " ... " in long


def test_errors_of_the_system_name_their_path() -> None:
    error = OSError(36, "File name too long", "ooo")
    assert str(of_the_system(error)) == "ooo: File name too long"
    assert of_the_system(OSError(2, "No such file or directory", "x")) is None and of_the_system(KeyError("x")) is None


def test_json() -> None:
    assert parse_json(b'\xef\xbb\xbf {"a": [1, -2.5e3, null, "\xc3\xbc"], "n": 1e300}') == {
        "a": [1, -2500.0, None, "ü"],
        "n": 1e300,
    }
    assert parse_json("[" * 100 + "]" * 100) is not None
    assert parse_json("NaN", finite=False) != parse_json("Infinity", finite=False) == float("inf")
    assert parse_json("1" * 4000, digits=4000) == int("1" * 4000)


@pytest.mark.parametrize(
    ("text", "reason", "line"),
    [
        ("[" * 101 + "]" * 101, "nested too deeply", None),
        ("[" * 100_000, "nested too deeply", None),
        ("1" * 41, "an integer of 41 digits; allowed: 40", None),
        ("-" + "1" * 4001, "an integer of 4002 digits", None),
        ("NaN", "NaN is not a finite number", None),
        ("[-Infinity]", "-Infinity is not a finite number", None),
        ("1e400", "1e400 is not a finite number", None),
        ("0." + "0" * 500, r"0\.0+\.\.\. is not a finite number, or too long", None),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' occurs twice", None),
        ("{\n\n", "Expecting property name", 3),
        ("", "Expecting value", 1),
        (b"[\xff]", r"not UTF-8 text \(byte 1\)", None),
        ("[1]".encode("utf-16"), "not UTF-8 text", None),
    ],
)
def test_json_beyond_its_bounds(text: str | bytes, reason: str, line: int | None) -> None:
    with pytest.raises(MalformedError, match=reason) as caught:
        parse_json(text)
    assert caught.value.line == line


def test_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_text('{"a": 1}\n\n[2]\n{"a"')
    assert read_lines(path) == ([(1, {"a": 1}), (3, [2])], True)
    path.write_text('{"a": 1}\n\n')
    assert read_lines(path) == ([(1, {"a": 1})], False)
    path.write_text('{"a": 1}\njunk\n{"a": 2}\n')
    with pytest.raises(UserError, match=r"journal:2: malformed JSON: Expecting value"):
        read_lines(path)


def test_yaml() -> None:
    text = "a: [1, 0x1f, 1_000, 1e-5, 1.5, .inf, 010]\nb: {c: yes, d: ~, e: 2020-01-01, f: '1', g: 12:30}\n"
    assert parse_yaml(text + 'h: "\\u00fc"') == {
        "a": [1, 31, 1000, 1e-5, 1.5, float("inf"), "010"],
        "b": {"c": True, "d": None, "e": "2020-01-01", "f": "1", "g": "12:30"},
        "h": "ü",
    }
    assert parse_yaml("x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}\nz: {<<: [*x, {c: 4, a: 9}]}\n") == {
        "x": {"a": 1, "b": 2},
        "y": {"a": 1, "b": 3},
        "z": {"a": 1, "b": 2, "c": 4},
    }
    assert parse_yaml("") is None and parse_yaml("!!float 3") == 3.0


@pytest.mark.parametrize(
    ("text", "reason", "line"),
    [
        ("a: &a [*a]", "nested too deeply, or in itself", 1),
        ("[" * 52 + "]" * 52, "nested too deeply", 1),
        ("a: 1\n1: 2", "a key is a word, found '1'; in quotes it would be one", 2),
        ("a: 1\nb: 2\na: 3", "the key 'a' occurs twice", 3),
        ("a: !!python/name:os.system x", "the tag 'tag:yaml.org,2002:python/name:os.system' means nothing here", 1),
        ("a: !!binary aGk=", "means nothing here", 1),
        ("a: !!int 0b1", "'0b1' is not an integer", 1),
        ("a: 9223372036854775808", "is not a 64-bit integer", 1),
        ("a: -1e999", "'-1e999' is larger than any number", 1),
        ("a: '\\0'\nb: \"\\0\"", r"a text with the character U\+0000", 2),
        ('a: "\\UFFFFFFFF"', ".", 1),
        ("a: {<<: 5}", "<< takes mappings, found a int", 1),
        ("a: 1\n---\nb: 2", "but found another document", 2),
    ],
)
def test_yaml_beyond_its_bounds(text: str, reason: str, line: int) -> None:
    with pytest.raises(MalformedYamlError, match=reason) as caught:
        parse_yaml(text)
    assert caught.value.line in (line, None)


def test_the_number_of_values_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_files, "VALUES", 10)
    assert parse_yaml("x: [" + "1, " * 8 + "]") == {"x": [1] * 8}
    for text in ("x: [" + "1, " * 9 + "]", "a: &a [1, 2, 3]\nb: [*a, *a]"):
        with pytest.raises(MalformedYamlError, match="has more than 10 values, with aliases or without"):
            parse_yaml(text)


def test_overrides_and_references() -> None:
    values = {"a": {"b": 1, "c": {"d": 2}}, "e": [1]}
    laid = with_overrides(values, ["a.c={f: 3}", "a.b=", "e=[4]", "g.h=1e-3"])
    assert laid == {"a": {"b": None, "c": {"d": 2, "f": 3}}, "e": [4], "g": {"h": 1e-3}}
    assert values == {"a": {"b": 1, "c": {"d": 2}}, "e": [1]}
    given = {"a": {"b": 3, "c": "${d}"}, "d": ["x", "${a.b}"], "e": "${a}", "f": "${d.0}-${a.b}", "g": "$HOME {}"}
    assert resolved(given) == {
        "a": {"b": 3, "c": ["x", 3]},
        "d": ["x", 3],
        "e": {"b": 3, "c": ["x", 3]},
        "f": "x-3",
        "g": "$HOME {}",
    }
    for name, reference in {
        "env": "${oc.env:HOME}",
        "relative": "${.b}",
        "open": "a ${b",
        "empty": "${}",
        "nested": "${a.${d}}",
        "nowhere": "${a.bb}",
        "index": "${d.7}",
        "itself": "${itself}",
        "list": "x${d}",
    }.items():
        with pytest.raises(UserError, match=f"^{name}: "):
            resolved(given | {name: reference})


def _pickled(value: Any, protocol: int = 4) -> bytes:
    return pickle.dumps(value, protocol)


def _nested() -> bytes:
    """{t: 1} of t(0) = (), t(i + 1) = (t(i), t(i)), t = t(59): 250 bytes, and the hash of t takes 2^59 steps."""
    return b"\x80\x04})\x94" + b"".join(b"h%c\x86\x94" % i for i in range(59)) + b"K\x01s."


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "EOFError"),
        (_nested(), "a tuple as a key"),
        (b"\x80\x04K", "."),
        (_pickled({("a",): 1}), "a tuple as a key"),
        (_pickled({1.5: 1}), "a float as a key"),
        (_pickled({"a"}), "it has an opcode or a value that is not allowed"),
        (_pickled(10**700), "is not allowed"),
        (_pickled(os.getcwd), "it names"),
        (_pickled(Path("x")), "it names"),
        (b"\x80\x02]r\xff\xff\xff\x0f.", "place 268435455 of a memo, in 9 bytes"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b".", "is not allowed"),
        (b"\x80\x04X\xff\xff\xff\x7fa.", "."),
    ],
)
def test_pickles_that_are_no_records(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "index").write_bytes(content)

    def name(module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    with pytest.raises(UserError, match=f"index: not an index: .*{reason}"):
        read_pickle(tmp_path / "index", name, "an index")


def test_a_pickle_of_records(tmp_path: Path) -> None:
    (tmp_path / "index").write_bytes(_pickled({"a": [1, 2.5, None, (True, "x")], 3: zipfile.ZipInfo("n").__class__}))
    found = read_pickle(tmp_path / "index", lambda module, name: Record, "an index")
    assert found == {"a": [1, 2.5, None, (True, "x")], 3: Record}


def _npy(header: dict[str, Any], data: bytes = b"") -> bytes:
    text = repr(header).encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def test_arrays(tmp_path: Path) -> None:
    path = tmp_path / "map.npz"
    np.savez(path, table=np.arange(3, dtype="<i4"), other=np.array([object()], dtype=object))
    assert read_arrays(path, {"table": "<i4"})["table"].tolist() == [0, 1, 2]
    fact = {"descr": "<i4", "fortran_order": False, "shape": (1,)}
    for content, reason in (
        (_npy(fact | {"shape": (1 << 40,)}), "its header says 1099511627776 elements"),
        (_npy(fact | {"shape": (-1,)}), "its header says -1 elements"),
        (_npy(fact | {"shape": (1, 1)}, bytes(4)), "2 dimensions"),
        (_npy(fact | {"descr": "<f8"}, bytes(8)), "has the type float64"),
        (_npy(fact | {"descr": "|O"}, bytes(8)), "has the type object"),
        (b"\x93NUMPY\x02\x00", "another version"),
        (b"", "ValueError"),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("table.npy", content)
        with pytest.raises(MalformedArraysError, match=reason):
            read_arrays(path, {"table": "<i4"})
    with pytest.raises(MalformedArraysError, match="KeyError"):
        read_arrays(path, {"absent": "<i4"})


def test_headers_of_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"

    def write(header: object, data: bytes = b"") -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)
        return path

    b, a = ({"dtype": "F32", "shape": [1, 2], "data_offsets": [i, i + 8]} for i in (0, 8))
    found = read_header(write({"__metadata__": {"x": "y"}, "a": a, "b": b}, bytes(16)))
    begin = path.stat().st_size - 16
    assert [(t.name, t.shape, t.start - begin, t.stop - begin) for t in found] == [
        ("b", (1, 2), 0, 8),
        ("a", (1, 2), 8, 16),
    ]
    for header, reason in (
        ({"b": b, "c": b}, "tensor c does not fill its place"),
        ({"b": b | {"data_offsets": [8, 0]}}, "does not fill its place"),
        ({"b": b | {"data_offsets": [0, 8, 9]}}, "not in the safetensors format"),
        ({"b": b | {"shape": [1 << 59, 1 << 59]}}, "does not fill its place"),
        ({"b": b | {"shape": [2.0]}}, "not in the safetensors format"),
        ({"b": b | {"shape": [1] * 17}}, "not in the safetensors format"),
        ({"b": b | {"dtype": 3}}, "not in the safetensors format"),
        ({"b": 3}, "not in the safetensors format"),
        ([b], "not in the safetensors format"),
        (b"[" * 1000, "nested too deeply"),
        (b'{"b": {}, "b": {}}', "the key 'b' occurs twice"),
    ):
        with pytest.raises(UserError, match=reason):
            read_header(write(header, bytes(8)))


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None], "n": [[1], []]}), path)
    assert list(read_parquet(path)) == [{"text": "a", "n": [1]}, {"text": None, "n": []}]
    content = path.read_bytes()
    path.write_bytes(content[:8] + b"\xff" * 20 + content[28:])
    with pytest.raises(UserError, match="rows.parquet: not a whole parquet file"):
        list(read_parquet(path))
    bad = pyarrow.Array.from_buffers(
        pyarrow.utf8(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"), pyarrow.py_buffer(b"\xff")]
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), path)
    with pytest.raises(UserError, match="not a whole parquet file: 'utf-8' codec can't decode"):
        list(read_parquet(path))
    # One text of 40 MB, 256 times: a file of 2 kB.
    text = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 256, pyarrow.int32()), ["x" * (40 << 20)])
    table = pyarrow.table({"text": text})
    pyarrow.parquet.write_table(table, path, compression="zstd", store_schema=False, dictionary_pagesize_limit=1 << 30)
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(UserError, match="rows.parquet: 256 rows of more than 1073741824 bytes, which are"):
        list(read_parquet(path))
    assert path.stat().st_size < 4000 and resource.getrlimit(resource.RLIMIT_AS) == before
    two = pyarrow.Table.from_arrays([pyarrow.array([1]), pyarrow.array([2])], names=["a", "a"])
    pyarrow.parquet.write_table(two, path)
    with pytest.raises(UserError, match="two columns have the same name, of a, a"):
        list(read_parquet(path))


class PanicException(BaseException):
    """As PyO3's: no Exception."""


def test_panics_are_errors_and_interrupts_are_not(capfd: pytest.CaptureFixture[str]) -> None:
    for error in (PanicException("called `Option::unwrap()`"), KeyError("vocab"), Exception("")):
        with (
            pytest.raises(UserError, match="model: cannot load a tokenizer: ."),
            tokenizer_errors("model: cannot load a tokenizer"),
        ):
            raise error
    for said, heard in ((PanicException("x"), ""), (ValueError("x"), "panicked at model.rs")):
        with pytest.raises(UserError), tokenizer_errors("x", quietly=True):
            os.write(2, b"panicked at model.rs")
            raise said
        assert capfd.readouterr().err == heard
    for stop in (KeyboardInterrupt, SystemExit):
        with pytest.raises(stop), tokenizer_errors("x"):
            raise stop
