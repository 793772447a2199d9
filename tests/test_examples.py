"""The examples are valid run files."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusemega.align.project import ProjectRun
from fusemega.config import Section, load
from fusemega.merge import methods  # noqa: F401  (registers them)
from fusemega.merge.method import find_method
from fusemega.merge.run_file import read_run
from fusemega.prune.run_file import PruneEvalRun, PruneRun
from fusemega.recipes.fusion import FusionRecipe
from fusemega.recipes.registry import read_recipe
from fusemega.reward.judge import JudgeRun
from fusemega.reward.rules import RulesRun
from fusemega.reward.verify import VerifyRun
from fusemega.sampling.run_file import SampleRun
from fusemega.scoring.evaluate import EvalRun
from fusemega.scoring.rewards import ScoreRun
from fusemega.scoring.teach import TeachRun
from fusemega.selection.run_file import SelectRun
from fusemega.switch.run_file import SwitchRun
from fusemega.switch.serve import SwitchServeRun
from fusemega.tasks.run_file import TasksRun
from fusemega.training.run_file import TrainRun

EXAMPLES = Path(__file__).parents[1] / "examples"
KINDS: dict[str, type[Section]] = {
    "train": TrainRun,
    "online": TrainRun,
    "chunk": TrainRun,
    "merge": TrainRun,
    "project_student": TrainRun,
    "teach": TeachRun,
    "project": ProjectRun,
    "eval": EvalRun,
    "score": ScoreRun,
    "verify": VerifyRun,
    "judge": JudgeRun,
    "rules": RulesRun,
}


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda p: str(p.relative_to(EXAMPLES)))
def test_examples_are_valid(path: Path) -> None:
    if path.parent.name == "merge":
        run, _ = read_run(path)
        assert find_method(run.merge_method)
    elif path.parent.name in ("fusellm", "fusechat"):
        load(FusionRecipe, path)
    elif path.parent.name == "blockpruner" and path.stem in ("search", "eval"):
        load(PruneRun if path.stem == "search" else PruneEvalRun, path)
    elif path.parent.name == "switch":
        load(SwitchServeRun if path.stem == "serve" else SwitchRun, path)
    elif path.parent.name == "tasks":
        load(TasksRun, path)
    elif path.parent.name in ("fusechat3", "wrpo", "fuserl", "mutual_taught") or path.stem == "heal":
        recipe, settings = read_recipe(path)
        assert settings.recipe == path.parent.name and isinstance(settings, recipe.Settings)
    elif path.parent.name == "sampling":
        load(SampleRun, path)
    elif path.parent.name == "selection":
        load(SelectRun, path)
    elif path.parent.name == "preference":
        load(KINDS.get(path.stem, TrainRun), path)
    else:
        load(KINDS[path.stem], path)
