"""Checks and measures this project on one GPU, part by part, in ten minutes: a table, and the same as JSON.

    python benchmarks/gpu/check.py [--quick] [--parts NAME ...] [--out FOLDER] [--minutes 10] [--keep]

Each part is a process of its own with a limit of its own: one that fails, dies or hangs is reported and hides no other.
Comparisons say what the error is and what is allowed; "measured" are figures without a bound. Without a GPU the same
parts run on the CPU at tiny sizes, against themselves on another path, and what only a GPU can show is "not measured".
`--quick` is that miniature on any machine. The rows of each part and its log are in FOLDER while it runs, `check.json`
after each part. Exit status 1 where anything is wrong, 2 where FOLDER cannot be used. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT / "benchmarks")  # in place of this file's folder
sys.path.insert(1, str(ROOT))

from fusemega.errors import UserError  # noqa: E402
from fusemega.files.lock import locked  # noqa: E402
from fusemega.files.owned import drop_scratch, mark_scratch  # noqa: E402
from gpu import table  # noqa: E402
from gpu.registry import PARTS  # noqa: E402
from gpu.runner import Result, run_parts  # noqa: E402


def about(quick: bool) -> dict[str, Any]:
    """When, where and of what."""
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    # An unpacked archive has no history, or that of a folder above it; its `run` says what was packed.
    commit = os.environ.get("FUSEMEGA_COMMIT", commit)
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return {"date": now, "host": platform.node(), "commit": commit or "unknown", "quick": quick}


def main() -> int:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes everywhere")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="default runs/gpu-check")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts together")
    parser.add_argument("--keep", action="store_true", help="leave FOLDER/work, the models that parts have made")
    args = parser.parse_args()
    folder, told = args.out.absolute(), about(args.quick)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the part in progress is ended
    found: dict[str, Any] = {}

    def tell(results: list[Result]) -> None:
        found.update(table.summary(results, told))
        table.write(folder, found)
        print("\n".join(table.lines(results[-1:])), flush=True)

    chosen = [part for part in PARTS if part.name in args.parts]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder):  # a second check would take away what this one works with
            mark_scratch(folder / "work")
            try:
                run_parts(chosen, folder, args.quick, 60 * args.minutes, tell)
            finally:
                if not args.keep:
                    drop_scratch(folder / "work")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    wrong: list[str] = found["wrong"]
    print(f"{len(wrong)} wrong, {found['not_measured']} not measured, of {found['rows']} rows: {folder}/check.json")
    print(json.dumps(found | {"parts": {name: part["end"] for name, part in found["parts"].items()}}))
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
