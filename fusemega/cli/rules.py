"""`fusemega rules`."""

from __future__ import annotations

from fusemega.cli.run_options import OVERRIDES, RUN_FILE


def command(run_file: RUN_FILE, overrides: OVERRIDES = None) -> None:
    """Score responses by simple rules: length, a regular expression, the exact answer, the share of Chinese.

    The rows are written again; each response gets `reward`. Prints one JSON object on stdout.
    """
    from fusemega.config import load
    from fusemega.reward.rules import RulesRun, apply_rules

    print(apply_rules(load(RulesRun, run_file, overrides or [])).model_dump_json())
