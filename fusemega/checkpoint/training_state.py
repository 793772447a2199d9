"""What a training checkpoint holds: model, optimizer and random state, in Megatron's distributed format (torch_dist).

    iter_0000020/
      hf/, manifest.json                   configuration, tokenizer, types of the weights: `RunCheckpoint` needs no more
      state.json                           iteration, consumed samples, layout, what the run was started with
      integrity.json                       size and hash of every file
      common.pt, metadata.json, .metadata, *.distcp   megatron-core's own files

Weights and optimizer state are stored by name and position in the whole model, so that any layout loads them. Rows of
vocabulary that pad it to a multiple of TP are zero in both, and are dropped or added as the layouts differ. The states
of the random generators belong to a rank: another layout starts them from the run's seed. Nothing draws from them while
a run trains (no family has dropout, and the order of the data is a function of the seed), so the curve is the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer

from fusemega.checkpoint.torch_dist import check_files, checkpoint_errors, fill_from_state, loadable_state
from fusemega.models.build import GPT
from fusemega.runtime.parallel import World
from fusemega.runtime.random_state import random_state, restore_random_state

# The optimizer format of megatron-core 0.16.1 that can be loaded in another layout; `fully_sharded_model_space` is
# broken there (dist_checkpointing/mapping.py:134).
# Experts have an optimizer of their own. A parameter's name says which, so no prefix is needed to tell states apart.
_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
# The sharded state of one data-parallel group is gathered on one of its ranks. Megatron's default gathers all of it on
# every one of them: 12 bytes a parameter of host memory each.
_SAVE_FORMAT = {**_OPTIMIZER_FORMAT, "distrib_optim_fully_reshardable_mem_efficient": True}


def training_state(gpt: GPT, optimizer: MegatronOptimizer, world: World) -> dict[str, Any]:
    """This rank's part of what a checkpoint holds. Collective."""
    model_state = gpt.sharded_state_dict()
    optimizer_state = optimizer.sharded_state_dict({"model": model_state}, metadata=_SAVE_FORMAT)
    # None where another rank holds it; removed, because megatron-core compares what is not sharded between ranks.
    for state in optimizer_state.values() if set(optimizer_state) == {0, 1} else (optimizer_state,):
        if state.get("param_state", ()) is None:
            del state["param_state"]
    return {
        "model": model_state,
        "optimizer": optimizer_state,
        "random_state": _random_state(world),
    }


def load_checkpoint(folder: Path, gpt: GPT, optimizer: MegatronOptimizer, world: World, same_layout: bool) -> None:
    """Fill model and optimizer from `folder`, in place; the random state too, in the layout that saved it. Collective.

    Raises:
        UserError: the folder cannot be read or does not fit the model.
    """
    check_files(folder)
    with checkpoint_errors(f"{folder}: checkpoint cannot be loaded"):
        model_state = loadable_state(gpt, folder)
        wanted = {
            "model": model_state,
            "optimizer": optimizer.sharded_state_dict(
                {"model": model_state}, is_loading=True, metadata=_OPTIMIZER_FORMAT
            ),
        }
        if same_layout:
            wanted["random_state"] = _random_state(world)
        loaded = dist_checkpointing.load(wanted, str(folder))
    fill_from_state(gpt, loaded["model"])
    with torch.no_grad():  # fp32 parameters are updated in place, through views of leaves
        optimizer.load_state_dict(loaded["optimizer"])
    if same_layout:
        restore_random_state({name: value[0].clone() for name, value in loaded["random_state"].items()})


def _random_state(world: World) -> dict[str, ShardedTensor]:
    """Each generator's state, stacked over ranks."""
    return {
        name: ShardedTensor.from_rank_offsets(f"random_state.{name}", value[None], (0, world.rank, world.world_size))
        for name, value in random_state().items()
    }
