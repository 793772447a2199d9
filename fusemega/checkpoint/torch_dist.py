"""Megatron distributed checkpoints (format torch_dist) of a model's weights alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from torch.distributed.checkpoint.api import CheckpointException

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
    if not dist_checkpointing.check_is_distributed_checkpoint(str(path)):
        raise UserError(f"{path}: not a Megatron distributed checkpoint (no metadata.json)")
    try:
        state = dist_checkpointing.load(loadable_state(model, path), str(path))
    except CheckpointException as error:  # torch's, not an Exception: it gathers what each rank raised
        cause = next(iter(error.failures.values()))[0]
        raise UserError(f"{path}: does not fit this model, or is damaged: {_first_line(cause)}") from None
    except (CheckpointingException, KeyError) as error:
        raise UserError(f"{path}: does not fit this model, or is damaged: {_first_line(error)}") from None
    fill_from_state(model, state)


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
    return name.endswith("._extra_state")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
