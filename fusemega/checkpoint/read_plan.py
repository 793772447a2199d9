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
from fusemega.models.rules import Piece, WeightRanks
from fusemega.models.stages import check_layout, stage_rules
from fusemega.runtime.layout import ParallelConfig


@dataclass(frozen=True)
class RankReads:
    """What one rank reads; its data- and context-parallel peers read the same, but for experts.

    Attributes:
        pp_rank: its pipeline stage.
        rank: its number in the stage. As many are listed as hold all weights: those of tensor parallelism, or more with
            expert parallelism.
        tensors: number of tensors of which it reads at least a part.
        boxes: number of boxes of them; each is one read of the file (in a Megatron folder, one for each tensor).
        nbytes: bytes of weights in those boxes.
        files: weight files it opens; 0 where the format does not say (Megatron's).
    """

    pp_rank: int
    rank: int
    tensors: int
    boxes: int
    nbytes: int
    files: int


def plan_reads(source: HFFolder | MegatronFolder, layout: ParallelConfig) -> list[RankReads]:
    """One entry for each rank that holds weights of its own, stage by stage.

    Raises:
        UserError: the layout does not divide the model.
    """
    check_layout(source.architecture, layout)
    places = WeightRanks.all_of(layout)
    out = []
    for pp_rank in range(layout.pipeline_model_parallel_size):
        rules = stage_rules(source.architecture, layout, pp_rank)
        for rank, place in enumerate(places):
            held = [rule for rule in rules if rule.held_by(place)]
            pieces = [rule.pieces(place) for rule in held]
            out.append(RankReads(pp_rank, rank, *_reads(source, pieces)))
    return out


def _reads(source: HFFolder | MegatronFolder, pieces: Sequence[Sequence[Piece]]) -> tuple[int, int, int, int]:
    """Tensors, boxes, bytes and files (see `RankReads`) of the pieces of each parameter."""
    if isinstance(source, HFFolder):
        boxes = [piece for parameter in pieces for piece in parameter]
        names = {piece.hf for piece in boxes}
        nbytes = sum(volume(piece.hf_box) * source.dtype(piece.hf).itemsize for piece in boxes)
        return len(names), len(boxes), nbytes, len({source.file(name) for name in names})
    elements = sum(volume(piece.local_box) for parameter in pieces for piece in parameter)
    return len(pieces), len(pieces), elements * source.dtype.itemsize, 0


def table(reads: Sequence[RankReads]) -> str:
    """The plan as text: a line for each run of ranks of a stage that read equally much."""
    lines = [f"{'stage':>5} {'ranks':>8} {'tensors':>8} {'boxes':>8} {'each reads':>11} {'files':>6}"]
    for key, run in groupby(reads, lambda r: (r.pp_rank, r.tensors, r.boxes, r.nbytes, r.files)):
        pp_rank, tensors, boxes, nbytes, files = key
        ranks = [r.rank for r in run]
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
