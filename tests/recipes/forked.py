"""`fusemega` commands as forks of this process, which has imported everything once: real processes, to be killed.

    python -m tests.recipes.forked FOLDER [MODELS]

MODELS is a function of `tests/recipes/small.py`, which writes the models. In FOLDER are recipe files and `todo.json`: a
list of [recipe file, kills], and kills is a list of [stage, file, lines]. The run is killed once the stage has begun
and the file has so many lines (a null file: at once), and started again. Each run's output goes to `log`.
`killed.json` tells, for each kill, what the file held.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

SECONDS = 300  # that a run may take
_PR_SET_CHILD_SUBREAPER = 36


def main(folder: Path, models: str = "write_models") -> None:
    import fusemega.launch.preloaded  # noqa: F401  (what ranks import)
    import fusemega.recipes.mutual_taught
    import fusemega.sampling.transformers_engine
    import fusemega.selection.run_file  # noqa: F401
    from tests.recipes import small

    assert ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0  # orphans of a killed run become ours
    os.chdir(folder)
    wait(forked(getattr(small, models)))
    killed = []
    for recipe, kills in json.loads(Path("todo.json").read_text()):
        for stage, file, lines in kills:
            out = Path(recipe).stem
            killed.append(kill_in(recipe, f"{out}/stages/{stage}.json", file and f"{out}/{file}", lines))
        status = wait(forked(lambda recipe=recipe: run(recipe)))
        assert status == 0, f"{recipe} ended with {status}"
    Path("killed.json").write_text(json.dumps(killed))


def kill_in(recipe: str, record: str, file: str | None, lines: int) -> str | None:
    """Starts the run and kills it, with its commands, in the stage of `record`; returns what `file` held."""
    pid, until = forked(lambda: run(recipe)), time.monotonic() + SECONDS
    while not (_state(record) == "begun" and (file is None or _lines(file) >= lines)):
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), f"{recipe} ended before it was killed in {record}"
        assert time.monotonic() < until, f"{recipe}: {record} did not begin, or {file} has fewer than {lines} lines"
        time.sleep(0.002)
    os.killpg(pid, signal.SIGKILL)
    while True:  # the run and its commands: one that still dies holds its locks
        try:
            os.waitpid(-pid, 0)
        except ChildProcessError:
            break
    assert _state(record) == "begun"
    return None if file is None else Path(file).read_text()


def run(recipe: str) -> None:
    """`fusemega run`, whose commands are forks too."""
    from fusemega.pipeline import run as running

    def command(argv: Sequence[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess(argv, wait(forked(lambda: fusemega(*argv[3:]), leads=False)))

    running.launch_ranks = lambda argv, nproc: wait(forked(lambda: fusemega(*argv), leads=False))  # type: ignore[assignment]
    running.subprocess = type("Forks", (), {"run": staticmethod(command)})  # type: ignore[assignment]
    fusemega("run", recipe)


def fusemega(*words: str) -> NoReturn:
    from fusemega import cli

    sys.argv = ["fusemega", *words]
    cli.main(list(words))
    sys.exit(0)


def forked(work: Callable[[], Any], leads: bool = True) -> int:
    """The id of a new process that does `work`; it `leads` a group of processes of its own."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        if leads:
            os.setsid()
            log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
        work()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(pid: int) -> int:
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return 128 - status if status < 0 else status


def _state(record: str) -> str:
    try:
        return str(json.loads(Path(record).read_text())["state"])
    except (OSError, ValueError):
        return ""


def _lines(file: str) -> int:
    try:
        return Path(file).read_bytes().count(b"\n")
    except OSError:
        return 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
