"""Trains a tiny model under layouts of this many ranks; saves in the middle and goes on. Reports curves."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fusemega.config import validate
from fusemega.training.run import TrainRun
from fusemega.training.train import open_trainer
from tests.distributed.launch import report


def curve(run: TrainRun, steps: int, save: bool = False) -> list[dict[str, float]]:
    trainer, _ = open_trainer(run)
    rows = [trainer.step() for _ in range(steps)]
    if save:
        trainer.save()
    return [{name: value for name, value in row.items() if name != "iteration-time"} for row in rows]


def main() -> None:
    cases: dict[str, dict[str, Any]] = json.loads(Path(sys.argv[1]).read_text())
    found: dict[str, Any] = {}
    for name, section in cases.items():
        run = validate(TrainRun, section, name)
        found[name] = curve(run, 4)
        broken = run.model_copy(update={"output_dir": f"{run.output_dir}-broken"})
        found[f"{name}, resumed"] = curve(broken, 2, save=True) + curve(broken, 2)
    report(found)


if __name__ == "__main__":
    main()
