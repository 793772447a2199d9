"""`output_dir/hf`: the weights that a run ends with, and the record that says which those are.

An export is made from a checkpoint's files, not from the memory of a process. So in every layout it has the fp32 main
parameters, and it works alike for the last and the best checkpoint, at once or when a run is started again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fusemega.checkpoint.megatron_folder import MegatronFolder, RunCheckpoint
from fusemega.checkpoint.series import retire
from fusemega.convert.convert import export_folder
from fusemega.errors import UserError
from fusemega.files.integrity import FILE as INTEGRITY
from fusemega.files.json_files import read_json
from fusemega.files.output import write_durably
from fusemega.hf.folder import HFFolder
from fusemega.runtime.console import say

HF = "hf"
RECORD = "fusemega_export.json"
_FORMAT = "fusemega-export-1"
DTYPES = {"source": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_export(output: Path) -> None:
    """Refuses a run whose `hf/` is not an export of a run, or has files that no export wrote: it is not replaced.

    Raises:
        UserError: says what to do with it.
    """
    hf = output / HF
    if not os.path.lexists(hf):
        return
    if hf.is_symlink() or (record := _record(hf)) is None:
        raise UserError(
            f"{hf}: has no {RECORD}, so its weights are unknown and it is not replaced; move it away, or "
            "use another output_dir"
        )
    for path in sorted(hf.rglob("*")):
        if path.is_symlink() or path.relative_to(hf).as_posix() not in record["files"]:
            raise UserError(f"{path}: not a file of the export in {hf}, so it is not replaced; move it away")


def update_export(
    output: Path,
    source: MegatronFolder | HFFolder,
    source_hash: str,
    dtype: str,
    finish: Callable[[Path], None] = lambda made: None,
) -> None:
    """Export `source` to `output/hf`, unless it is there already. First removes one of other weights. For one process.

    Args:
        output: the run's folder.
        source: a checkpoint of the run; or, where nothing was better, what it started from.
        source_hash: hash of its content.
        dtype: a key of `DTYPES`.
        finish: called with the new folder when all but its record is there.

    Raises:
        UserError: `hf` is no export of a run; a weight is too large for `dtype`; the disk is full.
    """
    hf = output / HF
    iteration = source.iteration if isinstance(source, RunCheckpoint) else 0
    record: dict[str, Any] = {"format": _FORMAT, "weights": source_hash, "iteration": iteration, "dtype": dtype}
    check_export(output)
    if hf.exists() and _is_of(hf, record):
        return
    _remove(hf, "is written again")

    def complete(made: Path) -> None:
        finish(made)
        files = sorted(path.relative_to(made).as_posix() for path in made.rglob("*"))
        write_durably(made / RECORD, json.dumps({**record, "files": [*files, INTEGRITY, RECORD]}, indent=1) + "\n")

    export_folder(source, hf, dtype=DTYPES[dtype], finish=complete)
    say(f"exported {hf}: the weights after iteration {iteration}")


def remove_other_export(output: Path, source_hash: str) -> None:
    """For a run that exports nothing: removes `output/hf` if it is an export of weights other than the final ones.

    Raises:
        UserError: as `check_export`.
    """
    hf = output / HF
    record = _record(hf)
    if record is not None and record.get("weights") != source_hash:
        check_export(output)
        _remove(hf, "removed")


def _remove(hf: Path, how: str) -> None:
    if (found := _record(hf)) is not None:
        say(f"{hf}: was of the weights after iteration {found.get('iteration')} of another run, or type; {how}")
        retire(hf)  # a kill in the middle leaves no half of an export under its name


def _record(hf: Path) -> dict[str, Any] | None:
    if not (hf / RECORD).is_file():
        return None
    found = read_json(hf / RECORD)
    return found if found.get("format") == _FORMAT and isinstance(found.get("files"), list) else None


def _is_of(hf: Path, record: dict[str, Any]) -> bool:
    return {**(_record(hf) or {}), **record} == _record(hf)
