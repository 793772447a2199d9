"""Writes a safetensors file tensor by tensor, so that the writer holds one tensor and not a shard."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from fusemega.hf.folder import DTYPES, INDEX_FILE, SINGLE_FILE

MAX_SHARD_SIZE = 5_000_000_000
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorInfo(NamedTuple):
    """What a file's header says of a tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(tensors: Iterable[TensorInfo], max_shard_size: int) -> dict[str, list[TensorInfo]]:
    """File name -> its tensors in file order, split in the same way as by `save_pretrained`.

    Args:
        tensors: in the model's order.
        max_shard_size: largest number of bytes of weights in a file. A larger tensor gets its own file; the tensors
            after it continue the file before it.

    >>> shards = plan_shards([TensorInfo(name, torch.float32, (4,)) for name in "abc"], max_shard_size=32)
    >>> {file: [info.name for info in tensors] for file, tensors in shards.items()}
    {'model-00001-of-00002.safetensors': ['a', 'b'], 'model-00002-of-00002.safetensors': ['c']}
    """
    shards: list[list[TensorInfo]] = []
    filling: list[TensorInfo] = []
    for info in tensors:
        if info.nbytes > max_shard_size:
            shards.append([info])
            continue
        if sum(other.nbytes for other in filling) + info.nbytes > max_shard_size:
            shards.append(filling)
            filling = []
        filling.append(info)
    if filling:
        shards.append(filling)
    # Inside a file, the order of the safetensors library: wider types first, so that each is aligned, then names.
    ordered = [sorted(shard, key=lambda info: (-info.dtype.itemsize, info.name)) for shard in shards]
    if len(ordered) == 1:
        return {SINGLE_FILE: ordered[0]}
    return {f"model-{i:05d}-of-{len(ordered):05d}.safetensors": shard for i, shard in enumerate(ordered, 1)}


def file_header(tensors: list[TensorInfo]) -> bytes:
    """All that a file holds before its weights, which follow in the order of `tensors`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for info in tensors:
        header[info.name] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [at, at + info.nbytes],
        }
        at += info.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the weights begin at a multiple of 8 bytes
    return len(encoded).to_bytes(8, "little") + encoded


def write_file(path: Path, tensors: list[TensorInfo], values: Iterator[torch.Tensor]) -> None:
    """Writes one file. `values` yields the tensors, in the order of `tensors` and of that dtype and shape."""
    with open(path, "wb") as file:
        file.write(file_header(tensors))
        for info, value in zip(tensors, values, strict=True):
            if value.dtype != info.dtype or tuple(value.shape) != info.shape:
                raise RuntimeError(f"{info.name}: planned {info}, got {value.dtype} {tuple(value.shape)}")
            file.write(raw_bytes(value))


def raw_bytes(value: torch.Tensor) -> memoryview:
    """A tensor's elements as a file holds them; not copied if it is contiguous and on the CPU."""
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def write_index(folder: Path, shards: dict[str, list[TensorInfo]]) -> None:
    """`model.safetensors.index.json` as `save_pretrained` writes it; nothing for a single file."""
    if len(shards) == 1:
        return
    infos = [info for shard in shards.values() for info in shard]
    metadata = {
        "total_parameters": sum(math.prod(info.shape) for info in infos),
        "total_size": sum(info.nbytes for info in infos),
    }
    weight_map = {info.name: file for file, shard in shards.items() for info in shard}
    text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True)
    (folder / INDEX_FILE).write_text(text + "\n", encoding="utf-8")
