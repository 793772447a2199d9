"""The process of one part: `python -m gpu.worker MODULE NAME FOLDER LIMIT [NEED ...] [--quick]`."""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from fusemega.runtime.lifeline import follow_starter
from gpu.job import Job
from gpu.report import WRONG, NotHereError, Report, Row, in_a_line


def _gpu(job: Job) -> None:
    if not job.card.is_gpu:
        raise NotHereError("no GPU")


def _transformer_engine(job: Job) -> None:
    from fusemega.runtime.kernel_packages import transformer_engine_problem

    if problem := transformer_engine_problem():
        raise NotHereError(problem)


# name -> raises NotHereError where it is missing
NEEDS: dict[str, Callable[[Job], None]] = {"gpu": _gpu, "transformer_engine": _transformer_engine}


def main() -> int:
    quick = "--quick" in sys.argv
    module, name, folder, limit, *needs = (word for word in sys.argv[1:] if word != "--quick")
    follow_starter()
    faulthandler.enable()
    # Where it hangs is in the log before it is ended.
    faulthandler.dump_traceback_later(max(float(limit) - 2, 1))
    report = Report(Path(folder) / f"{name}.jsonl")
    try:
        job = Job(name, Path(folder) / "work", quick)
        for need in needs:
            NEEDS[need](job)
        importlib.import_module(module).measure(report, job)
    except NotHereError as error:
        report.not_measured("all", str(error))
    except Exception as error:
        traceback.print_exc()
        report.add(Row("all", WRONG, in_a_line(error)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
