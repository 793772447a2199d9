"""`fusemega project`."""

from __future__ import annotations

import json

from fusemega.cli.run_options import OVERRIDES, RUN_FILE


def command(run_file: RUN_FILE, overrides: OVERRIDES = None) -> None:
    """Map a teacher's store to the target's ids with the rules of FuseLLM and FuseChat, to reproduce their results.

    Aligns both tokenizations of every text by dynamic time warping, maps the rows with the published rules, and writes
    a new store that `objective: distill` reads. Run the same command again to resume after an interruption. Training
    does not need this command: it aligns rows by bytes and maps them when it reads them, which is faster and uses only
    positions at which both models have read the same text. Prints one JSON object: how many positions learn from the
    teacher's `row`, from their own `label`, or from the target's `own` row.
    """
    from fusemega.align.project import ProjectRun, project
    from fusemega.config import load

    print(json.dumps(project(load(ProjectRun, run_file, overrides or []))))
