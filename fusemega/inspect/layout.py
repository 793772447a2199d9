"""`fusemega show layout`: which rank holds and reads what, and which samples it gets. Nothing is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from fusemega.checkpoint.open_model import ModelSource
from fusemega.checkpoint.read_plan import size
from fusemega.models.parts import Experts
from fusemega.models.stages import layers_of_stages
from fusemega.passes.micro_batch import Fields
from fusemega.runtime.layout import ParallelConfig
from fusemega.runtime.parallel import World
from fusemega.text.dataset import TokenizedDataset
from fusemega.training.assembly import Checked
from fusemega.training.run_file import TrainRun


def show_layout(run: TrainRun, nproc: int | None) -> list[RenderableType]:
    """A table with a line for each rank.

    Args:
        nproc: processes; None: as few as the layout allows.

    Raises:
        UserError: the layout does not divide the model or the processes, or what `train` would refuse of the run.
    """
    layout = run.parallel
    world_size = nproc or layout.model_parallel_size
    checked = Checked.of(run, world_size)
    source, dataset = checked.source, checked.prepared(run.data)
    reads = {(read.pp_rank, read.rank): read.nbytes for read in source.plan_reads()}
    per_stage = len(reads) // layout.pipeline_model_parallel_size
    experts = {layer.mlp.experts for layer in source.architecture.layers if isinstance(layer.mlp, Experts)}
    stages = layers_of_stages(source.architecture, layout)
    table = Table(box=None, pad_edge=False)
    columns = ["rank", "stage", "tensor", "context", "data", "layers", "and", "reads", "first update"]
    if experts:
        columns.insert(6, "experts")
    for name in columns:
        table.add_column(name, justify="right" if name in ("rank", "reads") else "left")
    shares: dict[int, str] = {}
    for rank in range(world_size):
        place = place_of(layout, world_size, rank)
        if place.dp_rank not in shares:
            whole = place_of(layout, world_size, rank, whole_rows=True)
            shares[place.dp_rank] = first_share(run, dataset, source, whole)
        table.add_row(
            str(rank),
            *(f"{at} of {of}" for at, of in (
                (place.pp_rank, place.pp_size), (place.tp_rank, place.tp_size),
                (place.cp_rank, place.cp_size), (place.dp_rank, place.dp_size),
            )),
            _ranges(stages[place.pp_rank]),
            *(_experts(place, count) for count in experts),
            " ".join(["embedding"] * place.is_first_stage + ["head"] * place.is_last_stage),
            size(reads[place.pp_rank, rank % (world_size // place.pp_size) % per_stage]),
            shares[place.dp_rank],
        )  # fmt: skip
    dp = layout.data_parallel_size(world_size)
    head = f"{run.model.load}: {len(source.architecture.layers)} layers, {world_size} process(es), {layout} x DP {dp}"
    note = "Ranks, stages and layers are counted from 0. Context-parallel ranks share the tokens of their samples."
    return [Text(head, style="bold"), table, Text(note)]


def place_of(layout: ParallelConfig, world_size: int, rank: int, whole_rows: bool = False) -> World:
    """The place that `initialize` would give a rank, without any process group.

    Args:
        layout: a layout that divides the world.
        whole_rows: leave out that context parallelism cuts rows.
    """
    tp, cp, pp = (
        layout.tensor_model_parallel_size,
        layout.context_parallel_size,
        layout.pipeline_model_parallel_size,
    )
    ep, expert_tp = layout.expert_model_parallel_size, layout.expert_tp_size
    dp = layout.data_parallel_size(world_size)
    no_group = cast(Any, None)
    return World(
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        device=torch.device("cpu"),
        # Megatron's order: tensor-parallel ranks lie next to each other, then context, data, and pipeline stages.
        tp_rank=rank % tp,
        tp_size=tp,
        pp_rank=rank // (tp * cp * dp),
        pp_size=pp,
        cp_rank=0 if whole_rows else rank // tp % cp,
        cp_size=1 if whole_rows else cp,
        dp_rank=rank // (tp * cp) % dp,
        dp_size=dp,
        ep_rank=rank // expert_tp % ep,
        ep_size=ep,
        expert_tp_rank=rank % expert_tp,
        expert_tp_size=expert_tp,
        tp_group=no_group,
        pp_group=no_group,
        cp_group=no_group,
        dp_group=no_group,
        dp_cp_group=no_group,
        host_group=no_group,
        layout=layout,
    )


def first_share(run: TrainRun, dataset: TokenizedDataset, source: ModelSource, place: World) -> str:
    """The share of the first update that a data-parallel rank gets, as text."""
    batches = run.batches(dataset, Fields(), source.pad_id, place).step(0)
    samples = sum(len(part) for part in batches.samples)
    tokens = sum(batch.tokens.numel() for batch in batches.micro_batches)
    return f"{samples} samples, {len(batches.micro_batches)} micro-batch(es), {tokens} tokens"


def _experts(place: World, count: int) -> str:
    """Which experts of each layer that has some, and which part of their matrices."""
    each = count // place.ep_size
    part = f", part {place.expert_tp_rank} of {place.expert_tp_size}" if place.expert_tp_size > 1 else ""
    return _ranges([range(place.ep_rank * each, (place.ep_rank + 1) * each)]) + part


def _ranges(pieces: Sequence[range]) -> str:
    return ", ".join(f"{piece.start}-{piece.stop - 1}" if len(piece) > 1 else str(piece.start) for piece in pieces)
