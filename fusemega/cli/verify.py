"""`fusemega verify`."""

from __future__ import annotations

from fusemega.cli.run_options import OVERRIDES, RUN_FILE


def command(run_file: RUN_FILE, overrides: OVERRIDES = None) -> None:
    """Check the responses of rows of prompt and responses: maths by value, code with its test cases in a sandbox.

    A row with `answer` is maths, one with `tests` is code. The rows are written again; each response gets `correct`
    (true, false, or null where it could not be decided) and `verdict`, the reason. Prints one JSON object on stdout.
    Run the same command again to resume after an interruption. The output appears complete or not at all.
    """
    from fusemega.config import load
    from fusemega.reward.verify import VerifyRun, verify

    print(verify(load(VerifyRun, run_file, overrides or [])).model_dump_json())
