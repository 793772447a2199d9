"""Megatron distributed checkpoints (format torch_dist): loads and saves weights, and turns errors into UserErrors."""

from __future__ import annotations

import errno
import io
import logging
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner
from torch.distributed.checkpoint.api import CheckpointException

from fusemega.checkpoint.index_file import read_index
from fusemega.checkpoint.torch_dist_files import FORMAT, main_parameters
from fusemega.errors import UserError
from fusemega.files.json_files import read_json
from fusemega.files.opening import require_regular
from fusemega.files.pickles import first_line, load_torch
from fusemega.models.build import GPT
from fusemega.runtime.meeting import is_echo
from fusemega.runtime.parallel import host_group

MIB = 1 << 20

# The messages in which torch's restricted unpickler names what it refuses.
_UNSAFE_NAME = re.compile(r"GLOBAL ([\w.]+) (?:was not an allowed global|whose module)")

# It logs what a writer process raised; `checkpoint_errors` says it, once and with the path.
logging.getLogger("megatron.core.dist_checkpointing.strategies.filesystem_async").setLevel(logging.CRITICAL)


def save_model(model: GPT, path: str | Path) -> None:
    """Write the weights into `path`, a folder that exists and is empty. Collective.

    Not atomic: the caller gives a folder under a temporary name and renames it.
    """
    dist_checkpointing.save(model.sharded_state_dict(), str(path))


@torch.no_grad()
def load_model(model: GPT, path: str | Path) -> None:
    """Fill a model from a checkpoint saved under any layout, with or without optimizer state. Collective.

    Weights are converted to the model's dtype; vocabulary padding is zero.

    Raises:
        UserError: not a checkpoint, or one of another architecture.
    """
    check_files(Path(path))
    with checkpoint_errors(f"{path}: does not fit this model, or is damaged"):
        wanted = loadable_state(model, path)
        if model.config.params_dtype == torch.float32:  # a bf16 model needs the stored weights: these, rounded
            wanted = _from_main(wanted, path)
        names = list(wanted)
        loaded = dist_checkpointing.load(wanted, str(path))
    # From a training checkpoint `load` also returns the optimizer's settings.
    fill_from_state(model, {name: loaded[name] for name in names})


def loadable_state(model: GPT, path: str | Path) -> dict[str, Any]:
    """What to ask of the checkpoint `path`: the model's sharded state, whichever layer spec it was saved from.

    Both specs share the keys of their weights. Transformer Engine's modules keep FP8 state beside them, of which only
    delayed scaling's (scales and maxima) is needed again; it is pickled, so it is left unread by every other model.
    """
    state: dict[str, Any] = model.sharded_state_dict()
    present: set[str] = set()
    if model.config.fp8 is not None and model.config.fp8_recipe == "delayed":
        present = {value.key for value in load_sharded_metadata(str(path)).values()}
    return {name: value for name, value in state.items() if not _is_extra(name) or value.key in present}


def _from_main(state: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """The same state, with the keys of a run's fp32 main parameters where the checkpoint has them."""
    main = main_parameters(value.key for value in load_sharded_metadata(str(path)).values())
    return {
        name: replace(value, key=main[value.key]) if isinstance(value, ShardedTensor) and value.key in main else value
        for name, value in state.items()
    }


def fill_from_state(model: GPT, state: dict[str, Any]) -> None:
    """Set the weights, and the FP8 state that was loaded with them.

    Raises:
        RuntimeError: the state is not one that `loadable_state` asked for.
    """
    missing, unexpected = model.load_state_dict(state, strict=False)
    wrong = [*unexpected, *(name for name in missing if not _is_extra(name))]
    if wrong:
        raise RuntimeError(f"not the state of this model: {', '.join(wrong)}")


def _is_extra(name: str) -> bool:
    return name.rpartition(".")[2].startswith("_extra_state")  # grouped products number theirs


def check_files(path: Path) -> None:
    """Checks that the small files of a distributed checkpoint are there, whole, and name nothing that could run.

    To be called before megatron-core reads them: it unpickles `.metadata` freely, and `common.pt` where the environment
    says so (TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD).

    Raises:
        UserError: names the file.
    """
    if not (path / "metadata.json").is_file():
        raise UserError(f"{path}: not a Megatron distributed checkpoint (no metadata.json)")
    found = {name: read_json(path / "metadata.json").get(name) for name in FORMAT}
    if found != FORMAT:
        raise UserError(f"{path / 'metadata.json'}: describes the format {found}, expected {FORMAT}")
    for name in ("common.pt", ".metadata"):
        if not (path / name).is_file():
            raise UserError(f"{path / name}: missing; the checkpoint is damaged")
    require_regular(path / "common.pt")
    if not zipfile.is_zipfile(path / "common.pt"):
        raise UserError(f"{path / 'common.pt'}: truncated, or not a file of torch; the checkpoint is damaged")
    try:
        load_torch(path / "common.pt")
    except pickle.UnpicklingError as error:
        raise UserError(f"{path / 'common.pt'}: damaged, or not of a checkpoint: {_reason(error, None)}") from None
    read_index(path / ".metadata")


@contextmanager
def checkpoint_errors(what: str, written: Path | None = None) -> Iterator[None]:
    """Turns what saving and loading raise, here or on another rank, into a UserError that begins with `what`.

    Args:
        written: the folder being written; torch's serializer does not report that its disk is full.
    """
    try:
        yield
    except CheckpointException as error:  # torch's, not an Exception: raised on every rank when any of them failed
        causes = [cause for cause, _ in error.failures.values()]
        reason = [_reason(causes[0], written) if causes else None]
        # A failed save reports the cause to its coordinator alone.
        dist.broadcast_object_list(reason, src=0, group=host_group())
        raise UserError(f"{what}: {reason[0]}") from error
    except (CheckpointingException, KeyError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        if is_echo(error):
            raise  # another rank has ended; the checkpoint is not at fault
        raise UserError(f"{what}: {_reason(error, written)}") from error


def _reason(error: BaseException, written: Path | None) -> str:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or (written is not None and written.exists() and shutil.disk_usage(written).free < MIB):
        return "the disk is full"
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    if named := _UNSAFE_NAME.search(str(error)):
        return f"it names {named[1]}, which no checkpoint needs"
    return first_line(error)


def _load_checked_object(planner: MCoreLoadPlanner, item: Any, value: io.BytesIO) -> None:
    """`load_bytes`, but only for objects that torch's restricted unpickler reads too."""
    load_torch(value)
    value.seek(0)
    _load_object(planner, item, value)


# torch/distributed/checkpoint/default_planner.py:390 unpickles objects freely.
_load_object = MCoreLoadPlanner.load_bytes
MCoreLoadPlanner.load_bytes = _load_checked_object
