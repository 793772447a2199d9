"""The run files of a graph's stages, checked as their commands will check them, before any stage runs."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

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
