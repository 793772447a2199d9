"""What `run_ranks` promises its workers, as seen from inside one; `--fail` and `--mute` break the promise back."""

from __future__ import annotations

import os
import sys

from tests.distributed.launch import report

if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    if "--fail" in sys.argv and rank == 1:
        raise ValueError("rank one gives up")
    if not ("--mute" in sys.argv and rank == 1):
        report({"rank": rank, "args": sys.argv[1:], "threads": os.environ["OMP_NUM_THREADS"]})
