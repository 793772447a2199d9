"""docs/extending.md does what it says: its code is put where it says, and its tests are run.

A block's first line is a comment that names a file. A new file is written; for a file that exists, the block is run as
the last lines of that module. Blocks below `tests/` are the page's own tests.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fusemega.merge.methods  # noqa: F401  (registers them, and those below theirs)
from fusemega import cli
from fusemega.align import kinds
from fusemega.losses import registry as losses
from fusemega.merge import method as merging
from fusemega.pipeline.functions import FUNCTIONS
from fusemega.recipes import registry as recipes

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS: list[tuple[str, str]] = re.findall(r"^```python\n# (\S+\.py)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
TESTS = [
    (path, node.name)
    for path, code in BLOCKS
    if path.startswith("tests/")
    for node in ast.parse(code).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
]
# What the parts register themselves in, beside the variables of modules that the page adds lines to.
REGISTRIES: list[dict[str, Any]] = [
    cli.COMMANDS,
    kinds.KINDS,
    recipes.MODULES,
    FUNCTIONS,
    losses._OBJECTIVES,
    merging._METHODS,
]


@pytest.fixture
def repository(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The repository with the page's code in it, and without it again after the test."""
    folder = tmp_path_factory.mktemp("page")
    before, registered = set(sys.modules), [dict(registry) for registry in REGISTRIES]
    changed: dict[str, dict[str, Any]] = {}
    for path, code in BLOCKS:
        if (ROOT / path).exists():
            continue
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(code, encoding="utf-8")
        package = importlib.import_module(str(Path(path).parent).replace("/", "."))
        if (place := str((folder / path).parent)) not in package.__path__:
            monkeypatch.setattr(package, "__path__", [*package.__path__, place])
    importlib.invalidate_caches()
    for path, code in BLOCKS:
        if (ROOT / path).exists():
            name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            variables = vars(importlib.import_module(name))
            changed.setdefault(name, dict(variables))
            exec(compile(code, path, "exec"), variables)
    yield
    for name in set(sys.modules) - before:
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            package_name, _, attribute = name.rpartition(".")
            vars(sys.modules[package_name]).pop(attribute, None)
            del sys.modules[name]
    restored = [(vars(sys.modules[name]), variables) for name, variables in changed.items()]
    for now, known in [*restored, *zip(REGISTRIES, registered, strict=True)]:
        now.clear()
        now.update(known)


@pytest.mark.parametrize(("path", "name"), TESTS, ids=[name for _, name in TESTS])
def test_the_page(path: str, name: str, repository: None, request: pytest.FixtureRequest) -> None:
    test = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
    test(**{argument: request.getfixturevalue(argument) for argument in inspect.signature(test).parameters})


def test_the_page_as_typed(tmp_path: Path) -> None:
    """A new process finds every part, and the generated reference describes it."""
    shutil.copytree(ROOT / "fusemega", tmp_path / "fusemega", ignore=shutil.ignore_patterns("__pycache__"))
    for path, code in BLOCKS:
        if path.startswith("fusemega/"):
            with (tmp_path / path).open("a", encoding="utf-8") as file:
                file.write("\n" + code)
    show = "from fusemega.cli.reference import pages; print(*pages().values())"
    environment = dict(os.environ, PYTHONPATH=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", show], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for heading in ("## `fusemega count`", "### `balanced`", "### `focal`", "### `hinge`"):
        assert heading in run.stdout


def test_every_part_has_a_test() -> None:
    parts = [section for section in PAGE.split("\n## ")[1:] if "\n```python\n# fusemega/" in section]
    assert len(parts) >= 7 and all("\n```python\n# tests/" in part for part in parts)


def test_the_page_is_formatted_and_names_nothing_twice() -> None:
    new = [path for path, _ in BLOCKS if not (ROOT / path).exists()]
    assert len(set(new)) == len(new) and len(BLOCKS) == PAGE.count("```python")
    for path, code in BLOCKS:
        assert max(map(len, code.splitlines())) <= 120, path
