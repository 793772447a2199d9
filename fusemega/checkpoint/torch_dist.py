"""Megatron distributed checkpoints (format torch_dist) of a model's weights alone."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from fusemega.checkpoint.hf_folder import read_json
from fusemega.errors import UserError
from fusemega.models.build import GPT


def save_model(model: GPT, path: str | Path) -> None:
    """Write the weights into `path`, a folder that exists and is empty. Collective.

    Not atomic: the caller gives a folder under a temporary name and renames it.
    """
    dist_checkpointing.save(model.sharded_state_dict(), str(path))


@torch.no_grad()
def load_model(model: GPT, path: str | Path) -> None:
    """Fill a model from a checkpoint saved under any layout, with or without optimizer state. Collective.

    Weights are converted to the model's dtype; vocabulary padding is zero. Megatron reads the small files of its
    format (`common.pt`, `.metadata`) with pickle: open only checkpoints whose writer is trusted.

    Raises:
        UserError: not a checkpoint, or one of another architecture.
    """
    check_files(Path(path))
    try:
        state = dist_checkpointing.load(model.sharded_state_dict(), str(path))
    except CheckpointException as error:  # torch's, not an Exception: it gathers what each rank raised
        cause = next(iter(error.failures.values()))[0]
        raise UserError(f"{path}: does not fit this model, or is damaged: {_first_line(cause)}") from None
    except (CheckpointingException, KeyError) as error:
        raise UserError(f"{path}: does not fit this model, or is damaged: {_first_line(error)}") from None
    model.load_state_dict(state)


def check_files(path: Path) -> None:
    """The small files of a distributed checkpoint are there and whole, as far as can be told without unpickling.

    Raises:
        UserError: names the file.
    """
    if not (path / "metadata.json").is_file():
        raise UserError(f"{path}: not a Megatron distributed checkpoint (no metadata.json)")
    read_json(path / "metadata.json")
    for name in ("common.pt", ".metadata"):
        if not (path / name).is_file():
            raise UserError(f"{path / name}: missing; the checkpoint is damaged")
    if not zipfile.is_zipfile(path / "common.pt"):
        raise UserError(f"{path / 'common.pt'}: truncated, or not a file of torch; the checkpoint is damaged")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
