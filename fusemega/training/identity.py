"""What a run was made from, by content: a resumed run may find its inputs at other paths, but must find the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from fusemega.checkpoint.open_model import ModelSource
from fusemega.checkpoint.series import STATE
from fusemega.errors import UserError
from fusemega.losses.registry import Objective
from fusemega.runtime.console import say
from fusemega.runtime.layout import ParallelConfig
from fusemega.runtime.parallel import World
from fusemega.runtime.together import on_main
from fusemega.text.dataset import TokenizedDataset
from fusemega.training.run_file import FREE_OPTIMIZER_FIELDS, IDENTITY_FIELDS, TrainRun

_SHARDED = "use_distributed_optimizer"


def content_of(
    source: ModelSource,
    objective: Objective[Any],
    dataset: TokenizedDataset,
    held_out: TokenizedDataset | None,
    world: World,
) -> dict[str, Any]:
    """The model that training starts from, the samples, and what the objective names (stores, maps, teachers).

    The main process reads all of it, once. Collective; every rank gets the same.

    Raises:
        UserError: something cannot be read; on every rank.
    """
    found: dict[str, Any] = {}

    on_main(world, lambda: found.update(read_content(source, objective, dataset, held_out)))
    return dict(world.from_main(found))


def read_content(
    source: ModelSource, objective: Objective[Any], dataset: TokenizedDataset, held_out: TokenizedDataset | None
) -> dict[str, Any]:
    """`content_of`, for one process."""
    return {
        "model": source.weights_hash(),
        "data": samples_hash(dataset),
        "held_out": None if held_out is None else samples_hash(held_out),
        "objective": objective.identity(dataset),
    }


def samples_hash(dataset: TokenizedDataset) -> str:
    """32 hex digits over the samples as they are trained on, in order; the same wherever their text came from."""
    digest = xxhash.xxh3_128()
    for values in dataset.contents():
        digest.update(np.ascontiguousarray(values).view(np.uint8).data)
    return digest.hexdigest()


def run_identity(run: TrainRun, content: Mapping[str, Any], consumed: int, train_iters: int) -> dict[str, object]:
    """What must not change between a checkpoint and the run that resumes it.

    Args:
        content: from `content_of`.
        consumed: samples used so far.
        train_iters: updates in all.
    """
    return {
        "consumed_samples": consumed,
        "train_iters": train_iters,
        "dtype": run.model.dtype,
        "fp8": run.model.fp8_settings() or None,
        "model": content["model"],
        "data": content["data"],
        "objective": run.objective.model_dump(mode="json") | content["objective"],
        "optimizer": run.optimizer.model_dump(exclude=set(FREE_OPTIMIZER_FIELDS)),
        "training": run.training.model_dump(include=set(IDENTITY_FIELDS), exclude_none=True),
    }


def check_identity(folder: Path, saved: Mapping[str, Any], identity: Mapping[str, object]) -> None:
    """Refuses the checkpoint `folder` of a run that was made from something else.

    Args:
        saved: what the checkpoint says.
        identity: this run's, from `run_identity`.

    Raises:
        UserError: names what differs.
    """
    # `saved` was read from JSON, where tuples are lists; the identity goes through JSON to compare equal.
    for name, value in json.loads(json.dumps(identity)).items():
        if name not in saved:
            raise UserError(
                f"{folder / STATE}: has no {name}: an earlier version wrote it, which did not record what a run is "
                "made from; finish the run with that version, or use another output_dir"
            )
        if (was := saved[name]) != value:
            why = " (hashes of what was read, wherever it lies)" if name in ("model", "data") else ""
            if name == "objective" and isinstance(was, dict):
                other = [key for key in (value | was) if was.get(key) != value.get(key)]
                why = f" (they differ in {', '.join(other)}; of files, by their contents, wherever they lie)"
            if name == "optimizer" and was == {**value, _SHARDED: not value[_SHARDED]}:
                why = f" (with and without {_SHARDED}, Megatron stores the state under other names)"
            raise UserError(
                f"{folder}: cannot resume: the checkpoint has {name} = {was}, this run {value}{why}; "
                "use the same settings, or another output_dir"
            )


def layout_of(run: TrainRun, world: World) -> dict[str, object]:
    """The layout, which may change: optimizer state is stored in a form that any layout loads."""
    return {"world_size": world.world_size, "parallel": run.parallel.model_dump()}


def is_same_layout(folder: Path, saved: Any, run: TrainRun, world: World) -> bool:
    """Whether the checkpoint `folder`, whose layout is `saved`, was written in this one; says so where it was not.

    Raises:
        UserError: the layout is not one that a run writes.
    """
    usual, own = ParallelConfig().model_dump(), layout_of(run, world)
    parallel = saved.get("parallel") if isinstance(saved, dict) else None
    # Older checkpoints lack newer keys.
    if saved == own or (isinstance(parallel, dict) and {**saved, "parallel": usual | parallel} == own):
        return True
    if world.is_main:
        if not isinstance(saved, dict) or not isinstance(parallel, dict):
            raise UserError(f"{folder / STATE}: its layout is {saved!r}, which is not a value that a run writes")
        told = {key: size for key, size in parallel.items() if size != usual.get(key)}
        say(
            f"{folder.name} was saved in another layout ({saved.get('world_size')} process(es), "
            f"{told or 'data parallel'}); loading it into the layout of this run"
        )
    return False
