"""`fusemega select`."""

from __future__ import annotations

import json

from fusemega.cli.run_options import OVERRIDES, RUN_FILE


def command(run_file: RUN_FILE, overrides: OVERRIDES = None) -> None:
    """Make training sets of scored responses by a published protocol: FuseChat-3.0, WRPO, FuseRL, or SimPO's pairs.

    Writes a folder with sft.jsonl, preference.jsonl or left.jsonl (whichever the protocol makes), removed.jsonl,
    selection.json, and selection.html, a page with counts, margins, lengths, sources and examples of each rule. Prompts
    can be deduplicated, and compared with the texts of benchmarks. The folder appears complete or not at all, and its
    bytes do not depend on the order of the rows. Prints one JSON object: rows of each file.
    """
    from fusemega.config import load
    from fusemega.selection.run_file import SelectRun
    from fusemega.selection.select import select

    run = load(SelectRun, run_file, overrides or [])
    print(json.dumps({"output_dir": run.output_dir, **select(run)["files"]}))
