"""Malformed inputs: each must end with status 2 and one line that names the cause, with nothing written.

    python benchmarks/badinput.py

Runs the tables of tests/bad_inputs in this process. Prints what was found wrong and, as last line, one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a row names a hub id that does not exist
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fusemega.runtime.console import quiet_megatron  # noqa: E402  (after the folder of `tests` is known)


def main() -> None:
    quiet_megatron()
    from tests.bad_inputs import base
    from tests.bad_inputs.rows import ROWS
    from tests.bad_inputs.run import found_wrong, standing_in

    wrong: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="badinput-") as scratch:
        sound = Path(scratch) / "base"
        sound.mkdir()
        os.environ["FUSEMEGA_CACHE"] = str(Path(scratch) / "cache")
        with standing_in(sound):
            base.build()
        begun = time.monotonic()
        for bad in ROWS:
            found = found_wrong(bad, sound, Path(scratch) / "place")
            if found is not None:
                wrong[f"{bad.kind}: {bad.name}"] = found
        seconds = time.monotonic() - begun
    for name, found in wrong.items():
        print(f"{name}\n{found}\n", file=sys.stderr)
    result = {
        "benchmark": "badinput",
        "inputs": len(ROWS),
        "kinds": dict(Counter(bad.kind for bad in ROWS)),
        "refused_as_they_should": len(ROWS) - len(wrong),
        "wrong": sorted(wrong),
        "seconds": round(seconds, 1),
    }
    print(json.dumps(result))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
