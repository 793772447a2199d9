"""`output_dir/hf`: the weights that a run ends with, and the record that says which those are.

An export is made of a checkpoint's files, not of what a process holds: so it is of the fp32 main parameters in every
layout, and the same whether the last or the best checkpoint is exported, at once or by a run that is started again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fusemega.checkpoint.convert import export_folder
from fusemega.checkpoint.hf_folder import HFFolder
from fusemega.checkpoint.megatron_folder import MegatronFolder, RunCheckpoint
from fusemega.errors import UserError
from fusemega.files.json_files import read_json
from fusemega.files.output import write_durably
from fusemega.runtime.console import say

HF = "hf"
RECORD = "fusemega_export.json"
_FORMAT = "fusemega-export-1"
DTYPES = {"source": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_export(output: Path) -> None:
    """Refuses a run whose `hf/` is no export of a run: nobody knows which weights those are.

    Raises:
        UserError: says what to do with it.
    """
    hf = output / HF
    if hf.exists() and _record(hf) is None:
        raise UserError(
            f"{hf}: has no {RECORD}, so it is not known which weights it holds, and it is not replaced; "
            "move it away, or use another output_dir"
        )


def update_export(
    output: Path,
    source: MegatronFolder | HFFolder,
    source_hash: str,
    dtype: str,
    finish: Callable[[Path], None] = lambda made: None,
) -> None:
    """Make `output/hf` of `source`, unless it is that already; one of other weights is removed first. By one process.

    Args:
        output: the run's folder.
        source: a checkpoint of the run; or, where nothing was better, what it started from.
        source_hash: of its content.
        dtype: a key of `DTYPES`.
        finish: called with the new folder when all but its record is there.

    Raises:
        UserError: `hf` is no export of a run; a weight is too large for `dtype`; the disk is full.
    """
    hf = output / HF
    iteration = source.iteration if isinstance(source, RunCheckpoint) else 0
    record: dict[str, Any] = {"format": _FORMAT, "weights": source_hash, "iteration": iteration, "dtype": dtype}
    check_export(output)
    if hf.exists() and _record(hf) == record:
        return
    remove_export(output)

    def complete(made: Path) -> None:
        finish(made)
        write_durably(made / RECORD, json.dumps(record, indent=1) + "\n")

    export_folder(source, hf, dtype=DTYPES[dtype], finish=complete)
    say(f"exported {hf}: the weights after iteration {iteration}")


def remove_export(output: Path) -> None:
    """Remove `output/hf` where it is an export of a run."""
    hf = output / HF
    if hf.exists() and (found := _record(hf)) is not None:
        say(f"{hf}: of other weights (of iteration {found.get('iteration')}); removed")
        doomed = hf.with_name(f".{HF}.removed")  # a kill in the middle leaves no half of an export under its name
        shutil.rmtree(doomed, ignore_errors=True)
        hf.rename(doomed)
        shutil.rmtree(doomed)


def _record(hf: Path) -> dict[str, Any] | None:
    if not (hf / RECORD).is_file():
        return None
    found = read_json(hf / RECORD)
    return found if found.get("format") == _FORMAT else None
