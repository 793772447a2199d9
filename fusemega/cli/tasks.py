"""`fusemega tasks`."""

from __future__ import annotations

from fusemega.cli.run_options import OVERRIDES, RUN_FILE


def command(run_file: RUN_FILE, overrides: OVERRIDES = None) -> None:
    """Measure a model on tasks: maths answers, programs, pairs, bits per byte; write outputs for other judges.

    Answers come from a model in this process or from a server, as in `fusemega sample`. `gsm8k` compares the number
    that an answer ends with, `humaneval` runs programs in a sandbox, `alpaca_eval` and `arena_hard` write the files
    that these tools judge, `pairs` and `bits_per_byte` read log-probabilities; `lm_eval` runs tasks of that package on
    the folder. Each answer is recorded as soon as it is there. Run the same command again to go on after an
    interruption. Prints a table on stdout; output_dir/tasks.json has the figures, what could not be judged, settings
    and versions.
    """
    from fusemega.config import load
    from fusemega.runtime.console import tell
    from fusemega.tasks.results import table
    from fusemega.tasks.run import run_tasks
    from fusemega.tasks.run_file import TasksRun

    tell(table(run_tasks(load(TasksRun, run_file, overrides or []))))
