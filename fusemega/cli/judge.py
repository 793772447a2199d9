"""`fusemega judge`."""

from __future__ import annotations

from fusemega.cli.run_options import OVERRIDES, RUN_FILE


def command(run_file: RUN_FILE, overrides: OVERRIDES = None) -> None:
    """Compare the responses of each row in pairs, with a model as the judge, behind a server or in this process.

    Each pair is judged twice, with the responses in both places. The rows are written again; each response gets
    `reward`, its share of wins. Answers without a verdict are counted, and count for nothing. Prints one JSON object
    on stdout. Run the same command again to resume after an interruption: no question is asked twice.
    """
    from fusemega.config import load
    from fusemega.reward.judge import JudgeRun, judge

    print(judge(load(JudgeRun, run_file, overrides or [])).model_dump_json())
