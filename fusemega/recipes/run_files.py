"""The run files of a graph's stages, checked as their commands will check them, before any stage runs."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

from fusemega.checkpoint.open_model import ModelConfig
from fusemega.config import Section, validate
from fusemega.pipeline.stage import Stage

KINDS = {
    "train": "fusemega.training.run_file:TrainRun",
    "teach": "fusemega.scoring.teach:TeachRun",
    "eval": "fusemega.scoring.evaluate:EvalRun",
    "score": "fusemega.scoring.rewards:ScoreRun",
    "sample": "fusemega.sampling.run_file:SampleRun",
    "verify": "fusemega.reward.verify:VerifyRun",
    "judge": "fusemega.reward.judge:JudgeRun",
    "rules": "fusemega.reward.rules:RulesRun",
    "select": "fusemega.selection.run_file:SelectRun",
    "tasks": "fusemega.tasks.run_file:TasksRun",
    "prune search": "fusemega.prune.run_file:PruneRun",
}
"""Command -> the class of its run file."""


def model_without_load(value: dict[str, Any], instead: str) -> dict[str, Any]:
    """The section `model` of a recipe's run files, checked; the recipe itself says which model each of them loads.

    Args:
        value: the section.
        instead: said where it has `load`.

    Raises:
        ValueError: it has `load`, or a setting that is wrong.
    """
    if "load" in value:
        raise ValueError(instead)
    ModelConfig(load="target", **value)
    return value


def check_run_files(stages: Iterable[Stage]) -> None:
    """Refuses a run file that its command would refuse, as far as the file alone shows that.

    Raises:
        UserError: the stage, the key, what was found and what is allowed.
    """
    for stage in stages:
        command = " ".join(stage.argv[:-1])
        if stage.run_file and command in KINDS:
            module, _, name = KINDS[command].partition(":")
            kind: type[Section] = getattr(importlib.import_module(module), name)
            validate(kind, stage.settings, f"stage {stage.name}")
