"""The rooms of the package: who may import whom, how long a file may be, and that every room says what it is for."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

from fusemega.cli import COMMANDS, GROUPS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fusemega"
# From the ground. A room imports from itself and from floors below; rooms of one floor not from each other.
FLOORS = (
    ("errors",),
    ("files",),
    ("run_values",),
    ("config",),
    ("runtime",),
    ("monitoring", "preflight"),
    ("fixtures", "text", "models"),
    ("hf", "store"),
    ("checkpoint",),
    ("convert", "align"),
    ("merge", "fusion", "logits"),
    ("passes",),
    ("losses",),
    ("scoring",),
    ("training",),
    ("report",),
    ("prune",),
    ("sampling",),
    ("reward",),
    ("selection",),
    ("mutual",),
    ("tasks",),
    ("switch",),
    ("launch", "inspect"),
    ("pipeline",),
    ("recipes",),
    ("cluster",),
    ("cli",),
    ("__init__", "__main__"),
)
MOST_LINES = 400
LONGER: dict[str, str] = {}  # file -> why it is one idea all the same


def _modules() -> list[str]:
    return sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in PACKAGE.rglob("*.py"))


def _path(module: str) -> Path:
    return ROOT / Path(*module.split(".")).with_suffix(".py")


def _room(module: str) -> str:
    """`fusemega.text.sample` -> text; of a module that stands alone, its name."""
    return module.split(".")[1]


@lru_cache
def _tree(module: str) -> ast.Module:
    return ast.parse(_path(module).read_text(encoding="utf-8"))


def _imports(module: str, *, at_start: bool) -> Iterator[str]:
    """The package's modules that it imports.

    Args:
        at_start: only what is imported with the module itself: not inside functions, not for types alone.
    """
    known = set(_modules())
    stack: list[ast.AST] = [_tree(module)]
    while stack:
        node = stack.pop()
        if at_start and (isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or _for_types(node)):
            continue
        stack += ast.iter_child_nodes(node)
        names = [name.name for name in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        if isinstance(node, ast.ImportFrom):
            joined = [f"{node.module}.{name}" for name in names if name != "__version__"]
            names = [name if {name, f"{name}.__init__"} & known else str(node.module) for name in joined]
        for name in names:
            if name.split(".")[0] == "fusemega":
                yield name if name in known else f"{name}.__init__"


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_a_room_imports_only_from_floors_below() -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    assert {_room(module) for module in _modules()} <= floor.keys(), "a new room has a floor in FLOORS"
    climbs = [
        f"{module} imports {other}"
        for module in _modules()
        for other in _imports(module, at_start=False)
        if _room(other) != _room(module) and floor[_room(other)] >= floor[_room(module)]
    ]
    assert climbs == []


def test_no_modules_import_each_other() -> None:
    imports = {module: set(_imports(module, at_start=True)) for module in _modules()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(imports[module]):
                if other != module:
                    visit(other, (*path, module))
            done.add(module)

    for module in imports:
        visit(module, ())


def test_a_file_holds_one_idea() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for folder in ("fusemega", "tools", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name for name, length in lengths.items() if length > MOST_LINES} == set(LONGER)


@pytest.mark.parametrize("room", sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py")))
def test_a_room_says_what_each_of_its_files_is_for(room: str) -> None:
    told = ast.get_docstring(_tree(f"fusemega.{room}.__init__")) or ""
    others = {"__init__", "__main__", *(COMMANDS if room == "cli" else ()), *(GROUPS if room == "cli" else ())}
    files = [path.name for path in sorted((PACKAGE / room).glob("*.py")) if path.stem not in others]
    assert [name for name in files if not re.search(rf"(?<![\w.]){re.escape(name)}", told)] == []


def test_no_two_classes_share_a_name() -> None:
    found: dict[str, list[str]] = {}
    for module in _modules():
        for node in _tree(module).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(module)
    assert {name: modules for name, modules in found.items() if len(modules) > 1} == {}


def test_the_architecture_page_lists_the_rooms_from_the_ground() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    places = [page.find(f"\n| `{room}/`") for rooms in FLOORS for room in rooms if (PACKAGE / room).is_dir()]
    assert -1 not in places and places == sorted(places)
