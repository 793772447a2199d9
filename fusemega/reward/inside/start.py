"""Begins what runs inside the sandbox: limits first, then the program, its tests, or the trial."""

from __future__ import annotations

import json
import os
import random
import select
import sys
from typing import Any

from . import cases, confine, program, trial


def main(settings: dict[str, Any]) -> None:
    """Runs what `settings` say; standard input is a file of JSON with the sources.

    Args:
        settings: `role` (program, cases, trial), `pipes` (numbers of open files), `seconds`, `memory`, `root`, and
            `alive`, a pipe that the process on the host holds the other end of.
    """
    given = json.loads(sys.stdin.buffer.read())
    confine.confine(settings["seconds"], settings["memory"], settings["root"])
    # The kernel ends this process with that on the host, unless that one died before it was asked to.
    if select.select([settings["alive"]], [], [], 0)[0]:
        return
    os.close(settings["alive"])
    os.environ.clear()
    # Nothing of ours, and no folder that the program writes to, is where it imports from.
    sys.path[:] = [path for path in sys.path if path.startswith(sys.base_prefix)] + given.get("path", [])
    sys.argv = [""]
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)
    random.seed(0)
    if settings["role"] == "program":
        calls, answers = settings["pipes"]
        program.run(given["sources"], calls, answers)
    elif settings["role"] == "cases":
        calls, answers, verdict = settings["pipes"]
        cases.Tests(calls, answers, verdict).run(given["tests"], given["entry_point"], given["context"])
    else:
        trial.run(settings["pipes"][0], given["host_file"], given["port"])
