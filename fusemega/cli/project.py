"""`fusemega project`."""

from __future__ import annotations

import json

from fusemega.cli.run_options import OVERRIDES, RUN_FILE


def command(run_file: RUN_FILE, overrides: OVERRIDES = None) -> None:
    """Bring a teacher's store into the target's ids the way FuseLLM and FuseChat do, for parity with their results.

    Aligns both tokenizations of every text by dynamic time warping and projects the rows with the published rules, into
    a new store that `objective: distill` reads. Run it again to go on after an interruption. Without it, rows are
    aligned by bytes and projected as they are read: faster, and only where both models have read the same text. Prints
    one JSON object: how many positions learn from the teacher's `row`, their own `label`, or the target's `own` row.
    """
    from fusemega.align.project import ProjectRun, project
    from fusemega.config import load

    print(json.dumps(project(load(ProjectRun, run_file, overrides or []))))
