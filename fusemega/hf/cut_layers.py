"""Makes a smaller model from a larger one by removing whole layers; the rest is renumbered and kept bit for bit."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import torch

from fusemega.errors import UserError
from fusemega.files.boxes import whole
from fusemega.files.integrity import write_integrity
from fusemega.hf.check import check_tensors
from fusemega.hf.folder import HFFolder
from fusemega.hf.loadable import settle
from fusemega.hf.proof import check_written
from fusemega.hf.safetensors_writer import MAX_SHARD_SIZE, TensorInfo, plan_shards, write_file, write_index
from fusemega.hf.side_files import copy_side_files
from fusemega.models.family import keep_layers
from fusemega.runtime.parallel import World
from fusemega.runtime.together import output_folder

_LAYER = re.compile(r"(.*\blayers\.)(\d+)(\..*)")


def cut_layers(source: str | Path, out: str | Path, drop: Collection[int], world: World) -> None:
    """Write the model of folder `source` without the layers `drop` (numbered from 0) to a new folder. One process.

    Raises:
        UserError: a damaged source, a layer it does not have, none left, or `out` is not empty.
    """
    folder = HFFolder(source)
    check_tensors(folder)
    check_written(folder)
    layers = folder.config["num_hidden_layers"]
    unknown = sorted(set(drop) - set(range(layers)))
    if unknown or len(set(drop)) == layers:
        raise UserError(f"{folder.path}: cannot drop layers {sorted(drop)}: it has layers 0 to {layers - 1}")
    kept = [layer for layer in range(layers) if layer not in drop]
    number = {old: new for new, old in enumerate(kept)}

    original: dict[str, str] = {}
    for name in folder:
        match = _LAYER.fullmatch(name)
        if match is None:
            original[name] = name
        elif int(match[2]) in number:
            original[f"{match[1]}{number[int(match[2])]}{match[3]}"] = name
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
        config = json.dumps(keep_layers(folder.config, kept), indent=2)
        (temporary / "config.json").write_text(config + "\n", encoding="utf-8")
        settle(temporary, folder.path, chats=False)
        write_integrity(temporary)
    cut = HFFolder(out)
    check_tensors(cut)
