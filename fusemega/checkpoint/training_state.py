"""Training checkpoints: model, optimizer, random state and position, in Megatron's distributed format (torch_dist).

    checkpoints/
      iter_0000020/                          whole: written as iter_0000020.tmp, then renamed
        state.json                           iteration, consumed samples, layout, what the run was started with
        common.pt, metadata.json, *.distcp   megatron-core's own files
      latest_checkpointed_iteration.txt      replaced atomically, after the rename

A process killed at any point leaves the previous checkpoint whole and named by the tracker file.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model

from fusemega.checkpoint.hf_folder import read_json
from fusemega.checkpoint.output import write_durably
from fusemega.checkpoint.torch_dist import check_files, checkpoint_errors, fill_from_state, loadable_state
from fusemega.errors import UserError
from fusemega.runtime.parallel import World
from fusemega.runtime.random_state import random_state, restore_random_state

TRACKER = "latest_checkpointed_iteration.txt"
STATE = "state.json"

# The optimizer format of megatron-core 0.16.1 that can be loaded in another layout; `fully_sharded_model_space` is
# broken there (dist_checkpointing/mapping.py:134).
_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}


def save_checkpoint(
    root: Path,
    iteration: int,
    ddp: DistributedDataParallel,
    optimizer: MegatronOptimizer,
    state: Mapping[str, Any],
    world: World,
) -> Path:
    """Write `root/iter_{iteration:07d}` and point the tracker at it. Collective: every rank calls it.

    Args:
        root: the run's `checkpoints` folder.
        iteration: finished iterations.
        ddp, optimizer: what is saved.
        state: JSON-able values stored in `state.json`; `read_state` gives them back.
        world: this process's place.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    final = root / f"iter_{iteration:07d}"
    temporary = final.with_name(final.name + ".tmp")
    if world.is_main:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob("iter_*.tmp"):
            shutil.rmtree(leftover)
        temporary.mkdir()
    dist.barrier()
    try:
        with checkpoint_errors(f"{final}: checkpoint not saved", temporary):
            model_state = unwrap_model(ddp).sharded_state_dict()
            dist_checkpointing.save(_sharded_state(model_state, optimizer, world, is_loading=False), str(temporary))
            if world.is_main:
                write_durably(temporary / STATE, json.dumps({"iteration": iteration, **state}, indent=1))
                if final.exists():
                    shutil.rmtree(final)
                os.rename(temporary, final)
                write_durably(root / TRACKER, str(iteration))
    except UserError:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    dist.barrier()
    return final


def latest_checkpoint(root: Path) -> Path | None:
    """The newest whole checkpoint below `root`, or None.

    Raises:
        UserError: the tracker names a checkpoint that is not there.
    """
    tracker = root / TRACKER
    if not tracker.exists():
        return None
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    folder = root / f"iter_{int(text):07d}" if text.isdigit() else None
    if folder is None or not (folder / STATE).exists():
        raise UserError(f"{tracker}: names iteration {text!r}, but {root}/iter_{text:0>7}/{STATE} is not there")
    return folder


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON state of one checkpoint.

    Raises:
        UserError: damaged.
    """
    state = read_json(folder / STATE)
    if not isinstance(state.get("iteration"), int):
        raise UserError(f"{folder / STATE}: iteration is {state.get('iteration')!r}, expected a number")
    return state


def load_checkpoint(folder: Path, ddp: DistributedDataParallel, optimizer: MegatronOptimizer, world: World) -> None:
    """Fill model, optimizer and random state from `folder`, in place. Collective.

    Raises:
        UserError: the folder cannot be read or does not fit the model.
    """
    check_files(folder)
    with checkpoint_errors(f"{folder}: checkpoint cannot be loaded"):
        model_state = loadable_state(unwrap_model(ddp), folder)
        loaded = dist_checkpointing.load(_sharded_state(model_state, optimizer, world, is_loading=True), str(folder))
    fill_from_state(unwrap_model(ddp), loaded["model"])
    with torch.no_grad():  # fp32 parameters are updated in place, through views of leaves
        optimizer.load_state_dict(loaded["optimizer"])
    restore_random_state({name: value[0].clone() for name, value in loaded["random_state"].items()})


def _sharded_state(
    model_state: dict[str, Any], optimizer: MegatronOptimizer, world: World, *, is_loading: bool
) -> dict[str, Any]:
    return {
        "model": model_state,
        "optimizer": optimizer.sharded_state_dict(
            {"model": model_state}, is_loading=is_loading, metadata=_OPTIMIZER_FORMAT
        ),
        "random_state": {
            name: ShardedTensor.from_rank_offsets(
                f"random_state.{name}", value[None], (0, world.rank, world.world_size)
            )
            for name, value in random_state().items()
        },
    }
