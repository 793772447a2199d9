"""Trains a tiny model, with experts or not, on several ranks; saves in the middle and goes on, also in the next layout.

    expert_training.py CASES    JSON: "cases", name -> run file of a training; perhaps "teach", that of a `teach`

Reports each curve, what an evaluation finds after that of `sft`, and the curve that goes on from the checkpoint of the
case before.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from fusemega.config import validate
from fusemega.scoring.evaluation import evaluate_model
from fusemega.scoring.teach import TeachRun, teach
from fusemega.training.assembly import open_trainer
from fusemega.training.run_file import TrainRun
from tests.distributed.launch import report
from tests.distributed.workers.training import take


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    runs = {name: validate(TrainRun, section, name) for name, section in asked["cases"].items()}
    found: dict[str, Any] = {}
    for name, run in runs.items():
        trainer, _ = open_trainer(run)
        found[name] = take(trainer, 2)
        if name.startswith("sft"):
            trainer.save()
        found[name] += take(trainer, 2)
        if name.startswith("sft"):
            data = trainer.data
            found[f"{name}, scored"] = evaluate_model(trainer.gpt, data.dataset, data.shape, trainer.world).model_dump()
    for name, other in pairwise(name for name in runs if name.startswith("sft")):
        moved = runs[other].model_copy(update={"output_dir": runs[name].output_dir})
        trainer, _ = open_trainer(moved)
        assert trainer.iteration == 2
        found[f"{name}, then {other}"] = take(trainer, 2)
    if "teach" in asked:
        teach(validate(TeachRun, asked["teach"], "teach"))
    report(found)


if __name__ == "__main__":
    main()
