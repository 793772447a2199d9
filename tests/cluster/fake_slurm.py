"""Slurm's commands as a script in PATH: it notes what they are called with, and says what a test has decided."""

from __future__ import annotations

import shlex
from pathlib import Path

COMMANDS = ("sbatch", "scontrol", "squeue", "scancel", "sacct")
_SCRIPT = r"""#!/bin/bash
here={here}
name=${0##*/}
printf '%q ' "$name" "$@" >>"$here/calls"
echo >>"$here/calls"
case $name in
    sbatch)
        if [[ $1 == --test-only ]]; then
            [[ ! -s $here/refuses ]] || { cat "$here/refuses" >&2; exit 1; }
            echo "sbatch: Job 1 to start at a time" >&2
            exit 0
        fi
        number=$(($(<"$here/last") + 1))
        [[ $number != "$(cat "$here/refused" 2>/dev/null)" ]] || { echo "sbatch: error: no more" >&2; exit 1; }
        echo "$number" >"$here/last"
        echo "$number;cluster"
        ;;
    scontrol)
        cat "$here/job-$4" 2>/dev/null || { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }
        ;;
    squeue) cat "$here/queue" 2>/dev/null ;;
    sacct) cat "$here/accounts" 2>/dev/null ;;
esac
"""


class FakeSlurm:
    """A folder with the commands.

    Args:
        here: an empty folder.

    Attributes:
        bin: for PATH.
    """

    def __init__(self, here: Path) -> None:
        self.here, self.bin = here, here / "bin"
        self.bin.mkdir(parents=True)
        (here / "last").write_text("100")
        for name in COMMANDS:
            (self.bin / name).write_text(_SCRIPT.replace("{here}", shlex.quote(str(here))))
            (self.bin / name).chmod(0o755)

    def calls(self, name: str) -> list[list[str]]:
        """The words with which a command was called, each time."""
        path = self.here / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [words[1:] for words in map(shlex.split, lines) if words[0] == name]

    def submitted(self) -> list[list[str]]:
        """The words of `sbatch` for jobs, not for tests."""
        return [words[1:] for words in self.calls("sbatch") if words[0] == "--parsable"]

    def knows(self, job: str, *tasks: str, **fields: str) -> None:
        """What `scontrol show job` says of a job from now on; of the `tasks` of an array, a line each."""
        usual = {"JobState": "RUNNING", "Reason": "None", "Restarts": "0", "RunTime": "00:10:00"}
        usual |= {"TimeLimit": "01:00:00", "NodeList": "node[1-2]", "WorkDir": "/home", "Comment": "none"}
        lines = []
        for number, task in enumerate(tasks or [""]):
            array = f" ArrayJobId={job} ArrayTaskId={task}" if task else ""
            said = " ".join(f"{key}={value}" for key, value in (usual | fields).items())
            lines.append(f"JobId={int(job) + number}{array} JobName=some job {said} StdOut=/tmp/x")
        (self.here / f"job-{job}").write_text("\n".join(lines) + "\n")

    def forgets(self, job: str) -> None:
        """It ended long ago."""
        (self.here / f"job-{job}").unlink()
