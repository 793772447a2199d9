"""Calls the function of a stage by hand, as the stage would: `python -m fusemega.pipeline.call FILE`.

FILE is `stages/NAME.yaml` of a recipe's output folder: `function` and its `arguments`. The result is printed as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fusemega.config import Section, load
from fusemega.errors import UserError
from fusemega.files.output import write_durably
from fusemega.pipeline.functions import find_function
from fusemega.pipeline.stage import Stage, Stop
from fusemega.runtime.console import quiet_megatron, tell


class Call(Section):
    """A file that names a function and its arguments."""

    function: str
    arguments: dict[str, Any] = {}


def write_call(stage: Stage, folder: Path) -> None:
    """Writes the file with which a stage's function can be called by hand."""
    call = {"function": stage.function, "arguments": stage.settings}
    text = f"# {stage.command(folder)}\n{yaml.safe_dump(call, sort_keys=False)}"
    write_durably(stage.call_file(folder), text)


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    quiet_megatron()
    try:
        if len(argv) != 1:
            raise UserError(f"expected one file, as in python -m fusemega.pipeline.call FILE; found {len(argv)} words")
        call = load(Call, argv[0])
        tell(json.dumps(find_function(call.function)(**call.arguments)))
    except Stop as stop:
        tell(f"stopped: {stop.reason}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
