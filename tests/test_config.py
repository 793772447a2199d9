"""Run files: every mistake is named by file, key and nearest valid name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from fusemega.config import Section, load, read_yaml
from fusemega.errors import UserError, choose, nearest


class Inner(Section):
    learning_rate: float = 1e-3
    style: Literal["cosine", "linear"] = "cosine"


class Outer(Section):
    name: str
    inner: Inner = Inner()
    parts: list[Inner] = []


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_values_overrides_and_references(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\ninner: {learning_rate: 1e-5}\nparts: [{style: linear}]\n")
    run = load(Outer, path, ["inner.style=linear", "name=b"])
    assert run == Outer(name="b", inner=Inner(learning_rate=1e-5, style="linear"), parts=[Inner(style="linear")])
    assert read_yaml(write(tmp_path, "a: 3\nb: ${a}\n")) == {"a": 3, "b": 3}


BAD = [
    ("name: a\ninner: {learning_rat: 1}\n", [], r"inner\.learning_rat: unknown key \(did you mean 'learning_rate'\?\)"),
    ("name: a\ninnr: {}\n", [], r"innr: unknown key \(did you mean 'inner'\?\); allowed here: name, inner, parts"),
    ("name: a\nparts: [{}, {stile: linear}]\n", [], r"parts\.1\.stile: unknown key \(did you mean 'style'"),
    ("name: a\ninner: {style: cosin}\n", [], r"inner\.style: found 'cosin' \(did you mean 'cosine'\?\); allowed"),
    ("name: a\ninner: {learning_rate: fast}\n", [], r"inner\.learning_rate: .*number.*'fast'"),
    ("inner: {}\n", [], "name: required, and not given"),
    ("- a\n- b\n", [], "a run file is a mapping"),
    ("name: [a\n", [], r"run\.yaml:\d+: malformed YAML"),
    ("name: a\nb: ${nowhere}\n", [], "nowhere"),
    ("name: a\n", ["inner.style"], "expected key=value"),
    ("name: a\n", ["inner..style=x"], "expected key=value"),
]


@pytest.mark.parametrize(("text", "overrides", "message"), BAD)
def test_mistakes_are_named(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(Outer, write(tmp_path, text), overrides)
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent.yaml: cannot read the run file: No such file"):
        load(Outer, tmp_path / "absent.yaml")
    (tmp_path / "run.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(UserError, match="not UTF-8"):
        load(Outer, tmp_path / "run.yaml")


def test_names() -> None:
    assert nearest("distil", ["sft", "distill"]) == " (did you mean 'distill'?)"
    assert nearest("xyzzy", ["sft"]) == ""
    assert choose("objective", "sft", ["sft"]) == "sft"
    with pytest.raises(UserError, match=r"unknown name 'sfd' \(did you mean 'sft'\?\); allowed: distill, sft"):
        choose("objective", "sfd", ["sft", "distill"])
