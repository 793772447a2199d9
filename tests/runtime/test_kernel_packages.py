"""Packages under which megatron-core would compute wrongly are refused before it is imported."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusemega.errors import UserError
from fusemega.runtime import kernel_packages

ROOT = Path(__file__).resolve().parents[2]


def foreign(folder: Path, name: str = "apex", inside: str = "web") -> Path:
    (folder / name / inside).mkdir(parents=True)
    (folder / name / "__init__.py").write_text("print('imported')")
    return folder


def test_a_foreign_apex_ends_a_command_in_one_line(tmp_path: Path) -> None:
    path = os.pathsep.join([str(foreign(tmp_path)), str(ROOT)])
    command = [sys.executable, "-m", "fusemega", "teach", str(tmp_path / "run.yaml")]
    run = subprocess.run(command, env=dict(os.environ, PYTHONPATH=path), capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == "", "apex was imported"
    assert run.stderr.startswith("error: the installed package apex is not NVIDIA's") and run.stderr.count("\n") == 1


def test_nvidias_apex_is_let_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(foreign(tmp_path, inside="multi_tensor_apply")))
    assert not kernel_packages.foreign_apex()
    kernel_packages.refuse_harmful()


def test_a_transformer_engine_that_cannot_be_imported_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.11.0")  # as after an install without its library
    with pytest.raises(UserError, match="transformer-engine cannot be imported.*pip uninstall transformer-engine"):
        kernel_packages.refuse_harmful()


@pytest.mark.parametrize(
    ("version", "fault"),
    [("2.8.0", True), ("2.9.0", False), ("2.11.0+abc123", False), ("2.12.0", True), ("2.11.0.dev0", False)],
)
def test_versions_megatron_core_takes(version: str, fault: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    monkeypatch.setattr(kernel_packages, "_import_failure", lambda: None)
    found = kernel_packages.transformer_engine_fault()
    assert (found is not None) == fault and (not fault or version in str(found))
