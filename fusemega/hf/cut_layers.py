"""Makes a smaller model from a larger one by leaving out layers or single blocks of them.

What stays is renumbered and kept bit for bit. One tensor at a time is in memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fusemega.errors import UserError
from fusemega.files.boxes import whole
from fusemega.files.integrity import write_integrity
from fusemega.hf.check import check_tensors
from fusemega.hf.folder import HFFolder
from fusemega.hf.loadable import settle
from fusemega.hf.proof import check_written
from fusemega.hf.safetensors_writer import MAX_SHARD_SIZE, TensorInfo, plan_shards, write_file, write_index
from fusemega.hf.side_files import copy_side_files, write_config
from fusemega.models.family import keep_layers
from fusemega.runtime.parallel import World
from fusemega.runtime.together import output_folder


class Halves(NamedTuple):
    """A layer of the smaller model: the layers of the larger one that its two blocks come from. None: it lacks one."""

    attention: int | None
    mlp: int | None


def cut_layers(source: str | Path, out: str | Path, drop: Collection[int], world: World) -> None:
    """Write the model of folder `source` without the layers `drop` (numbered from 0) to a new folder. One process.

    Raises:
        UserError: a damaged source, a layer it does not have, none left, or `out` is not empty.
    """
    folder = open_sound(source)
    layers = folder.config["num_hidden_layers"]
    unknown = sorted(set(drop) - set(range(layers)))
    if unknown or len(set(drop)) == layers:
        raise UserError(f"{folder.path}: cannot drop layers {sorted(drop)}: it has layers 0 to {layers - 1}")
    kept = [layer for layer in range(layers) if layer not in drop]
    write_layers(folder, out, [Halves(layer, layer) for layer in kept], keep_layers(folder.config, kept), world)


def open_sound(source: str | Path) -> HFFolder:
    """An open folder whose tensors are those of its configuration, and undamaged.

    Raises:
        UserError: they are not.
    """
    folder = HFFolder(source)
    check_tensors(folder)
    check_written(folder)
    return folder


def write_layers(
    folder: HFFolder,
    out: str | Path,
    layers: Sequence[Halves],
    hf_config: Mapping[str, Any],
    world: World,
    finish: Callable[[Path], None] = lambda folder: None,
) -> list[str]:
    """Write a model whose layers are made of blocks of the model in `folder`. One process.

    Args:
        folder: from `open_sound`.
        out: absent or empty; appears complete or not at all.
        layers: the layers of the new model.
        hf_config: its configuration.
        world: of this process.
        finish: called with the written folder before it gets its name.

    Returns:
        What a user should know of the folder (see `settle`).

    Raises:
        UserError: `out` is not empty, or the disk is too small.
    """
    original = _originals(folder, layers)
    infos = [TensorInfo(new, folder.dtype(old), folder.shape(old)) for new, old in original.items()]

    def values(shard: list[TensorInfo]) -> Iterator[torch.Tensor]:
        for info in shard:
            yield folder.read(original[info.name], whole(info.shape))

    with output_folder(Path(out), world, needed_bytes=sum(info.nbytes for info in infos)) as temporary:
        shards = plan_shards(infos, MAX_SHARD_SIZE)
        for file, shard in shards.items():
            write_file(temporary / file, shard, values(shard))
        write_index(temporary, shards)
        copy_side_files(folder.path, temporary)
        write_config(temporary, hf_config)
        notes = settle(temporary, folder.path, chats=False)
        check_tensors(HFFolder(temporary))
        finish(temporary)
        write_integrity(temporary)
    return notes


def _originals(folder: HFFolder, layers: Sequence[Halves]) -> dict[str, str]:
    """New name -> old name, in the order of the new model's tensors."""
    architecture = folder.architecture
    in_layer = re.compile(re.escape(architecture.layers_name) + r"\d+\..*")
    out = {name: name for name in folder if not in_layer.fullmatch(name)}
    for number, halves in enumerate(layers):
        for part, layer in halves._asdict().items():
            if layer is not None:
                for name in architecture.block_tensors(layer, part):
                    prefix = architecture.layers_name
                    out[f"{prefix}{number}.{name}"] = f"{prefix}{layer}.{name}"
    return out
