"""Plans what each rank of a layout reads of a model's weights, from configurations and file headers alone.

Nothing is allocated and no process group is needed, so one process can plan for any layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path

import torch

from fusemega.checkpoint.megatron_folder import MegatronFolder, open_megatron
from fusemega.files.boxes import volume
from fusemega.files.output import refuse_existing
from fusemega.hf.check import check_tensors
from fusemega.hf.folder import HFFolder
from fusemega.hf.safetensors_writer import TensorInfo, plan_shards
from fusemega.models.rules import WeightRanks
from fusemega.models.stages import check_layout, stage_rules
from fusemega.runtime.layout import ParallelConfig


@dataclass(frozen=True)
class RankReads:
    """What one rank reads; its data- and context-parallel peers read the same.

    Attributes:
        pp_rank, tp_rank: its place.
        tensors: number of tensors of which it reads at least a part.
        boxes: number of boxes of them; each is one read of the file (in a Megatron folder, one for each tensor).
        nbytes: bytes of weights in those boxes.
        files: weight files it opens; 0 where the format does not say (Megatron's).
    """

    pp_rank: int
    tp_rank: int
    tensors: int
    boxes: int
    nbytes: int
    files: int


def plan_reads(source: HFFolder | MegatronFolder, layout: ParallelConfig) -> list[RankReads]:
    """One entry for each tensor- and pipeline-parallel rank, stage by stage.

    Raises:
        UserError: the layout does not divide the model.
    """
    check_layout(source.architecture, layout)
    rank_reads = _hf_reads if isinstance(source, HFFolder) else _megatron_reads
    return [
        rank_reads(source, pp_rank, tp_rank, layout)  # type: ignore[arg-type]
        for pp_rank in range(layout.pipeline_model_parallel_size)
        for tp_rank in range(layout.tensor_model_parallel_size)
    ]


def _hf_reads(folder: HFFolder, pp_rank: int, tp_rank: int, layout: ParallelConfig) -> RankReads:
    rules, ranks = (
        stage_rules(folder.architecture, layout, pp_rank),
        WeightRanks(layout.tensor_model_parallel_size, tp_rank),
    )
    pieces = [piece for rule in rules for piece in rule.pieces(ranks)]
    names = {piece.hf for piece in pieces}
    nbytes = sum(volume(piece.hf_box) * folder.dtype(piece.hf).itemsize for piece in pieces)
    return RankReads(pp_rank, tp_rank, len(names), len(pieces), nbytes, len({folder.file(name) for name in names}))


def _megatron_reads(folder: MegatronFolder, pp_rank: int, tp_rank: int, layout: ParallelConfig) -> RankReads:
    rules, ranks = (
        stage_rules(folder.architecture, layout, pp_rank),
        WeightRanks(layout.tensor_model_parallel_size, tp_rank),
    )
    elements = sum(volume(piece.local_box) for rule in rules for piece in rule.pieces(ranks))
    return RankReads(pp_rank, tp_rank, len(rules), len(rules), elements * folder.dtype.itemsize, 0)


def table(reads: Sequence[RankReads]) -> str:
    """The plan as text: a line for each run of tensor-parallel ranks of a stage that read equally much."""
    lines = [f"{'stage':>5} {'TP ranks':>8} {'tensors':>8} {'boxes':>8} {'each reads':>11} {'files':>6}"]
    for key, run in groupby(reads, lambda r: (r.pp_rank, r.tensors, r.boxes, r.nbytes, r.files)):
        pp_rank, tensors, boxes, nbytes, files = key
        ranks = [r.tp_rank for r in run]
        span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
        lines.append(f"{pp_rank:>5} {span:>8} {tensors:>8} {boxes:>8} {size(nbytes):>11} {files or '-':>6}")
    total, most = sum(r.nbytes for r in reads), max(r.nbytes for r in reads)
    lines.append(f"{len(reads)} rank(s) read {size(total)} in all, {size(most)} at most")
    return "\n".join(lines)


def size(nbytes: int) -> str:
    """A size as text, in decimal units, with three digits or more."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.{2 if nbytes < 10 * scale else 1}f} {unit}"
    return f"{nbytes} B"


def describe_import(source: str | Path, out: Path, layout: ParallelConfig) -> str:
    """What `fusemega convert import` would write, and what a run from the source would read, rank by rank.

    Raises:
        UserError: what the import itself would refuse.
    """
    refuse_existing(out)
    folder = HFFolder(source)
    check_tensors(folder)
    reads = table(plan_reads(folder, layout))
    names = folder.architecture.hf_shapes()
    nbytes = sum(prod(folder.shape(name)) * folder.dtype(name).itemsize for name in names)
    return f"{reads}\nwould write {size(nbytes)} of weights to {out}\n{NOTHING_DONE}"


def describe_export(
    source: str | Path,
    out: Path,
    layout: ParallelConfig,
    *,
    dtype: torch.dtype | None,
    max_shard_size: int,
    iteration: int | None = None,
) -> str:
    """What `fusemega convert export` would write, and what a run from the source would read, rank by rank.

    Raises:
        UserError: what the export itself would refuse.
    """
    refuse_existing(out)
    folder = open_megatron(source, iteration)
    reads = table(plan_reads(folder, layout))
    infos = [
        TensorInfo(name, dtype or folder.dtypes[name], shape) for name, shape in folder.architecture.hf_shapes().items()
    ]
    files, nbytes = len(plan_shards(infos, max_shard_size)), sum(info.nbytes for info in infos)
    return f"{reads}\nwould write {len(infos)} tensors, {size(nbytes)} in {files} file(s), to {out}\n{NOTHING_DONE}"


NOTHING_DONE = "nothing was allocated or written"
