"""Every row of the table: status 2, one line that names the cause, nothing written."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from fusemega.errors import UserError
from tests.bad_inputs import base
from tests.bad_inputs.rows import ROWS
from tests.bad_inputs.run import Bad, found_wrong, standing_in


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base, in which every command succeeds."""
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSEMEGA_CACHE", str(tmp_path_factory.mktemp("cache")))
        with standing_in(folder):
            base.build()
    return folder


@pytest.mark.parametrize("bad", ROWS, ids=[f"{bad.kind}: {bad.name}" for bad in ROWS])
def test_refused_with_its_cause_and_nothing_written(bad: Bad, sound: Path, tmp_path: Path) -> None:
    wrong = found_wrong(bad, sound, tmp_path / "place")
    assert wrong is None, wrong
    assert not list((tmp_path / "cache").rglob("*.partial")), "half a data cache was left"


def test_the_table_says_each_thing_once_and_covers_every_kind() -> None:
    names = Counter((bad.kind, bad.name) for bad in ROWS)
    assert not [name for name, count in names.items() if count > 1]
    kinds = Counter(bad.kind for bad in ROWS)
    assert len(ROWS) >= 60 and min(kinds.values()) >= 5, kinds


COMMANDS = [f"train {name}.yaml" for name in ("train", "distill", "online", "resume")]
COMMANDS += ["teach teach.yaml", "teach more.yaml"]
COMMANDS += [f"{name} {name}.yaml" for name in ("sample", "verify", "judge", "rules", "select", "tasks")]
COMMANDS += ["train fuse.yaml", "project project.yaml", "align model model new.npz", "run recipe.yaml --dry-run"]
COMMANDS += ["prune search prune.yaml", "prune eval prune_eval.yaml", "prune apply model order.json new"]
COMMANDS += ["run prune_recipe.yaml --dry-run", "run mutual.yaml --dry-run"]
COMMANDS += ["launch train.yaml --gpus-per-node 2 --print", "status run"]
COMMANDS += ["launch resume.yaml --gpus-per-node 1 --print", "launch recipe.yaml --gpus-per-node 2 --print"]


@pytest.mark.parametrize("command", [*COMMANDS, "eval eval.yaml", "convert export megatron out"])
def test_the_base_itself_is_not_refused(command: str, sound: Path, tmp_path: Path) -> None:
    """Else a row could pass for another reason than its own."""
    wrong = found_wrong(Bad("none", "nothing", command, ""), sound, tmp_path / "place")
    assert wrong is not None and wrong.startswith("status 0"), wrong


def test_an_error_is_one_line_whatever_a_library_says() -> None:
    assert str(UserError("model: no\n  roles\r\nhere")) == "model: no roles here"
