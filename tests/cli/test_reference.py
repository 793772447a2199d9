"""The committed reference pages are what the code says today, and leave nothing out."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusemega import cli
from fusemega.cli.reference import pages
from fusemega.config import Section
from fusemega.losses.registry import objective_named, objective_names
from fusemega.merge.method import find_method, method_names
from fusemega.merge.run_file import MergeRun, ModelEntry
from fusemega.scoring.evaluate import EvalRun
from fusemega.scoring.teach import TeachRun
from fusemega.selection.protocol import protocol_named, protocol_names
from fusemega.selection.run_file import NamedSet, SelectRun
from fusemega.training.run_file import TrainRun

FOLDER = Path(__file__).parents[2] / "docs" / "reference"


@pytest.mark.parametrize("name", ["config.md", "cli.md"])
def test_the_committed_page_is_current(name: str) -> None:
    assert (FOLDER / name).read_text(encoding="utf-8") == pages()[name], "run python tools/make_reference.py"


def test_every_key_is_explained() -> None:
    page, unseen = pages()["config.md"], [TrainRun, TeachRun, EvalRun]
    unseen += [objective_named(name).Settings for name in objective_names()]
    import fusemega.merge.methods  # noqa: F401  (registers them)

    unseen += [MergeRun, ModelEntry, SelectRun, NamedSet]
    unseen += [protocol_named(name).Settings for name in protocol_names()]
    for method in map(find_method, method_names()):
        unseen += [method.Settings, method.ModelSettings]
    seen: set[type[Section]] = set()
    while unseen:
        model = unseen.pop()
        seen.add(model)
        for name, field in model.model_fields.items():
            rows = [line.split(" | ") for line in page.splitlines() if line.startswith(f"| `{field.alias or name}` |")]
            assert rows and all(len(row) == 4 and row[3].strip(" |") for row in rows), f"{model.__name__}.{name}"
            inner = field.annotation
            if (
                isinstance(inner, type)
                and issubclass(inner, Section)
                and inner not in seen
                and name not in ("objective", "protocol")
            ):
                unseen.append(inner)
    assert "Exactly one of train_iters and train_epochs" in page and "`lambda`" in page


def test_every_command_is_there() -> None:
    page = pages()["cli.md"]
    for name in cli.COMMANDS:
        assert f"## `fusemega {name}`" in page
    for verb in ("convert import", "convert export", "convert verify", "store inspect", "store merge", "store verify"):
        assert f"## `fusemega {verb}`" in page
    assert "`--dry-run`" in page and "`--nproc`" in page and "`--max-shard-size` | `5GB`" in page
