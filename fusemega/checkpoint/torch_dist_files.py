"""The files of a Megatron distributed checkpoint (torch_dist), read and written without building a model.

    common.pt       what is not a tensor: nothing, for weights alone
    metadata.json   megatron-core's note of the format
    .metadata       torch.distributed.checkpoint's index, a pickle: global shapes, chunks, and where each chunk lies
    *.distcp        chunks, each a `torch.save` of one box of one global tensor

Megatron stacks layers that are alike: `decoder.layers.3.mlp.linear_fc2.weight` [H, F] is element 3 of the global tensor
`decoder.layers.mlp.linear_fc2.weight` [layers, H, F]. The experts of a layer are stacked too, after the layers. Its
keys are those of Transformer Engine's layer spec, whatever the spec of the model that is saved. Each linear layer of a
block also has an `_extra_state` object, empty without FP8.
The tests hold keys, shapes and objects against megatron-core's own `sharded_state_dict`.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import IO, Any, cast

import torch

from fusemega.checkpoint.index_file import read_index
from fusemega.errors import UserError
from fusemega.files.boxes import whole
from fusemega.files.moves import Assembled, Move, Stored, window
from fusemega.files.opening import open_regular
from fusemega.files.pickles import first_line, load_torch
from fusemega.models.architecture import Architecture
from fusemega.models.rules import WHOLE, Rule, VocabRows

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
_EXPERT = re.compile(r"mlp\.experts\.(.*\.weight)\d+")
# Where the optimizers of megatron-core 0.16.1 keep fp32 main parameters: the distributed one, and the one of bf16 runs.
_MAIN = ("optimizer.state.param.", "optimizer.state.fp32_param.")
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Place:
    """Where one rule's parameter, in the form in which a single rank would hold all of it, lies in the checkpoint.

    Attributes:
        rule: the rule.
        key: key of the global tensor.
        global_shape: shape of the global tensor.
        leading: its index along each leading dimension, of layers and of experts; () where there is none.
    """

    rule: Rule
    key: str
    global_shape: tuple[int, ...]
    leading: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape, without the leading dimensions."""
        return self.global_shape[len(self.leading) :]

    def extra_state(self) -> str | None:
        """Key of the object that Megatron's linear layers save beside their weight; None for other parameters."""
        in_layer = _LAYER.fullmatch(self.rule.megatron) is not None
        if not in_layer or self.rule.partition_dim is None or not self.key.endswith(".weight"):
            return None
        sizes = self.global_shape[: len(self.leading)]
        at, of = (".".join(map(str, numbers)) for numbers in (self.leading or (0,), sizes or (1,)))
        return f"{self.key.removesuffix('weight')}_extra_state/shard_{at}_{of}"


def places(architecture: Architecture) -> list[Place]:
    """Every parameter of the model, in the order of HF's tensors; second copies (a tied head) are not stored."""
    out = []
    for rule in architecture.rules("transformer_engine"):
        if rule.duplicate:
            continue
        key, stacked = rule.megatron, []
        match = _LAYER.fullmatch(key)
        if match is not None and architecture.alike:
            key = f"decoder.layers.{match[2]}"
            stacked.append((int(match[1]), len(architecture.layers)))
        if rule.expert is not None:
            key = _EXPERT.sub(r"mlp.experts.experts.\1", key)
            stacked.append(rule.expert)
        leading, sizes = (tuple(each[i] for each in stacked) for i in (0, 1))
        out.append(Place(rule, key, (*sizes, *rule.local_shape(WHOLE)), leading))
    return out


@dataclass(frozen=True)
class StoredChunk:
    """One entry of a `.distcp` file.

    Attributes:
        key: key of the global tensor, or of an object.
        offsets: where the chunk begins in the global tensor; None for an object.
        sizes: the chunk's shape.
        dtype: torch's name.
        file, start, length: the entry's bytes in a file, whose path is relative to the checkpoint.
    """

    key: str
    offsets: tuple[int, ...] | None
    sizes: tuple[int, ...]
    dtype: str
    file: str
    start: int
    length: int


class _Gap(io.RawIOBase):
    """A file that keeps what is written before and after the one gap that its writer seeks over."""

    def __init__(self) -> None:
        self.parts = [bytearray()]

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.parts[-1] += data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        assert whence == io.SEEK_CUR and len(self.parts) == 1, "torch.save seeks over the data, once"
        self.parts.append(bytearray())
        return offset


@lru_cache
def envelope(shape: tuple[int, ...], dtype: str) -> tuple[bytes, bytes]:
    """What `torch.save` writes before and after the data of a tensor. Allocates no memory for it."""
    out = _Gap()
    with torch.serialization.skip_data():
        torch.save(torch.empty(shape, dtype=getattr(torch, dtype)), cast(IO[bytes], out))
    head, tail = out.parts
    return bytes(head), bytes(tail)


@lru_cache
def empty_object() -> bytes:
    """An `_extra_state` without content, as Megatron writes it."""
    out = io.BytesIO()
    torch.save([None], out)
    return out.getvalue()


def write_metadata(folder: Path, chunks: Iterable[StoredChunk], global_shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Writes the small files for the chunks that the `.distcp` files hold. The same chunks give the same bytes."""
    # Imported here, because it takes a second: `convert.import_hf` imports it in a thread while chunks are copied.
    from torch.distributed.checkpoint import Metadata, TensorStorageMetadata
    from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        MetadataIndex,
        TensorProperties,
    )

    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for chunk in chunks:
        storage[MetadataIndex(chunk.key, chunk.offsets)] = _StorageInfo(chunk.file, chunk.start, chunk.length)
        if chunk.offsets is None:
            tensors[chunk.key] = BytesStorageMetadata()
            continue
        if chunk.key not in tensors:
            properties = TensorProperties(dtype=getattr(torch, chunk.dtype))
            tensors[chunk.key] = TensorStorageMetadata(properties, torch.Size(global_shapes[chunk.key]), [])
        entry = tensors[chunk.key]
        assert isinstance(entry, TensorStorageMetadata)
        entry.chunks.append(ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)))
    metadata = Metadata(state_dict_metadata=tensors, storage_data=storage, version=CURRENT_DCP_VERSION)
    with open(folder / ".metadata", "wb") as file:
        pickle.dump(metadata, file)
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(FORMAT), encoding="utf-8")


def main_parameters(keys: Iterable[str]) -> dict[str, str]:
    """Key of a weight -> key of its fp32 main parameter, for those of a checkpoint's weights that have one."""
    found = {key.removeprefix(prefix): key for key in keys for prefix in _MAIN if key.startswith(prefix)}
    return found


class Checkpoint:
    """The weights of a checkpoint written under any layout; for a run's, the fp32 main parameters where it has them.

    No other optimizer state is opened.

    Raises:
        UserError: not a checkpoint, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        metadata = _read_metadata(path)
        self._chunks: dict[str, list[tuple[tuple[int, ...], Stored]]] = {}
        self._by_place: dict[str, dict[tuple[int, ...], list[Move]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        files: dict[str, IO[bytes]] = {}
        try:
            main = main_parameters(metadata.state_dict_metadata)
            weights = {source: key for key, source in main.items()}
            for index, where in metadata.storage_data.items():
                if getattr(index, "offset", None) is None:  # an object, such as an extra state
                    continue
                key = weights.get(index.fqn, index.fqn)
                # Left out: a weight that has a main parameter, which takes its place, and all other state.
                if key in main and index.fqn == key or key.startswith(("optimizer.", "random_state.")):
                    continue
                self.shapes[key] = tuple(metadata.state_dict_metadata[index.fqn].size)
                if where.relative_path not in files:
                    files[where.relative_path] = open_regular(path / where.relative_path)  # closed below
                stored = _open_chunk(index.fqn, path / where.relative_path, files[where.relative_path], where)
                self._chunks.setdefault(key, []).append((tuple(index.offset), stored))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path / '.metadata'}: damaged: {error}") from None
        finally:
            for file in files.values():
                file.close()

    def files(self) -> list[Path]:
        """The index and the files that hold weights."""
        chunks = {Path(stored.path) for group in self._chunks.values() for _, stored in group}
        return [self.path / ".metadata", *sorted(chunks)]

    def hf_tensors(self, architecture: Architecture) -> dict[str, Assembled]:
        """Each HF tensor, in the model's order, as boxes of the chunks, in the type in which it is stored.

        Raises:
            UserError: the checkpoint lacks a part of the model.
        """
        out = {}
        for place in places(architecture):
            shapes = place.rule.hf_shapes()
            chunks = self._of(place)
            moves: dict[str, list[Move]] = {name: [] for name in shapes}
            for piece in place.rule.pieces(WHOLE):
                at = tuple(start for start, _ in piece.hf_box)
                moves[piece.hf] += window(chunks, piece.local_box, at)
            for name, shape in shapes.items():
                dtype = chunks[0].source.dtype if chunks else "float32"
                out[name] = Assembled(name, shape, dtype, tuple(moves[name]))
                if not out[name].complete:
                    found = self.shapes.get(place.key)
                    what = "is not there" if found is None else f"is of shape {list(found)}, or has a gap"
                    raise UserError(
                        f"{self.path}: does not fit this model, or is damaged: {place.key} {what}; "
                        f"config.json says {list(place.global_shape)}"
                    )
        return out

    def _of(self, place: Place) -> list[Move]:
        """The chunks that hold parts of a parameter, as moves into it."""
        shape = self.shapes.get(place.key, ())
        # Rows of vocabulary beyond HF's are padding of the layout that wrote it; any other difference is another model.
        padded = isinstance(place.rule, VocabRows)
        fits = len(shape) == len(place.global_shape) and all(
            a == b or (i == 0 and padded and a > b)
            for i, (a, b) in enumerate(zip(shape, place.global_shape, strict=True))
        )
        if not fits:
            return []
        count = len(place.leading)
        moves = self._moves(place.key, count).get(place.leading, [])
        own = tuple((at, at + 1) for at in place.leading)
        moves = window(moves, (*own, *whole(place.shape)), (0,) * len(shape)) if count else moves
        for _ in range(count):
            moves = [_without_leading(move) for move in moves]
        return moves

    def _moves(self, key: str, count: int) -> dict[tuple[int, ...], list[Move]]:
        """The chunks of a global tensor as moves into it, by their places along its first `count` dimensions."""
        if key not in self._by_place:
            found: dict[tuple[int, ...], list[Move]] = {}
            for offsets, stored in self._chunks.get(key, []):
                box = tuple((start, start + size) for start, size in zip(offsets, stored.shape, strict=True))
                for at in product(*(range(*span) for span in box[:count])):
                    found.setdefault(at, []).append(Move(stored, whole(stored.shape), box))
            self._by_place[key] = found
        return self._by_place[key]


def _without_leading(move: Move) -> Move:
    """A move of one layer or expert, with its part of the chunk as its source."""
    source = move.source
    (first, _), *inner = move.source_box
    one = Stored(source.name, source.path, source.offset, source.shape[1:], source.dtype)
    return Move(
        Stored(one.name, one.path, one.offset + first * one.nbytes, one.shape, one.dtype),
        tuple(inner),
        move.target_box[1:],
    )


def _open_chunk(key: str, path: Path, file: IO[bytes], where: Any) -> Stored:
    """Where a chunk's data lies in its file. Reads the chunk's header, not the data."""
    try:
        view = cast(IO[bytes], _View(file, where.offset, where.length))
        tensor = load_torch(view)
        start = tensor.untyped_storage()._checkpoint_offset
    except (AttributeError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: truncated or damaged at {key}: {first_line(error)}") from None
    if not tensor.is_contiguous() or tensor.storage_offset():
        raise UserError(f"{path}: {key} is stored with strides {tensor.stride()}, and only dense tensors are read")
    if start + tensor.nbytes > where.length:
        raise UserError(f"{path}: damaged at {key}: a tensor of {tensor.nbytes} bytes in a place of {where.length}")
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Stored(key, str(path), where.offset + start, tuple(tensor.shape), dtype)


class _View(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._length - self._at))
        self._file.seek(self._start + self._at)
        data = self._file.read(wanted)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


def _read_metadata(path: Path) -> Any:
    if not (path / "metadata.json").is_file():
        raise UserError(f"{path}: not a Megatron distributed checkpoint (no metadata.json)")
    return read_index(path / ".metadata")
