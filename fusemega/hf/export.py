"""Writes a Megatron model as a Hugging Face folder, in the form of `save_pretrained`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from fusemega.errors import UserError
from fusemega.files.boxes import slices, volume
from fusemega.files.integrity import write_integrity
from fusemega.files.json_files import read_json
from fusemega.hf.folder import INDEX_FILE, SINGLE_FILE, HFFolder
from fusemega.hf.narrowing import narrowed
from fusemega.hf.safetensors_writer import MAX_SHARD_SIZE, TensorInfo, plan_shards, write_file, write_index
from fusemega.hf.side_files import copy_side_files, exported_config, write_config
from fusemega.models.build import GPT, Placement, placements
from fusemega.models.rules import Piece, WeightRanks
from fusemega.runtime.parallel import World
from fusemega.runtime.together import on_main, output_folder


def export_hf(
    model: GPT,
    out: str | Path,
    source_folder: str | Path,
    world: World,
    *,
    dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write the model to a new folder. Collective: all processes call it; the main one writes, tensor by tensor.

    Args:
        model: its configuration becomes config.json, with the source's vocabulary size.
        out: absent or empty; appears complete or not at all.
        source_folder: where generation settings, tokenizer and chat template are copied from.
        world: the layout of `model`.
        dtype: dtype of the written weights: one for all, or one for each HF tensor. None: those of `source_folder`'s
            tensors, or of its config.json if it holds no weights, or else the model's own.
        max_shard_size: bytes of weights in a file.
        finish: called by the main process with the written folder, before it gets its name.

    Raises:
        UserError: `out` is not empty, the source cannot be read, or the disk is too small.
    """
    out, source = Path(out), Path(source_folder)
    model_placements = placements(model, world)
    on_main(world, lambda: _check_source(source))
    infos = _tensor_infos(model, _dtypes(model, source, dtype))
    shards = plan_shards(infos, max_shard_size)
    sources = _Sources(model, model_placements, world)
    with output_folder(out, world, needed_bytes=sum(info.nbytes for info in infos)) as temporary:
        for file, shard in shards.items():
            values = (sources.collect(info) for info in shard)
            if world.is_main:
                write_file(temporary / file, shard, _present(values))
            else:
                for _ in values:  # every rank takes part in the transfer of each tensor
                    pass
        if world.is_main:
            copy_side_files(source, temporary)
            write_index(temporary, shards)
            write_config(temporary, exported_config(model.hf_config, infos[0].dtype), sort_keys=True)
        if finish is not None:
            on_main(world, lambda: finish(temporary))
        on_main(world, lambda: write_integrity(temporary))


class _Sources:
    """Knows which rank holds what, and brings one whole HF tensor at a time to the main process."""

    def __init__(self, model: GPT, model_placements: list[Placement], world: World) -> None:
        self.world = world
        self.model = model
        self.places = WeightRanks.of(world)
        self.rules = {name: rule for rule in model.rules() if not rule.duplicate for name in rule.hf_shapes()}
        self.parameters = {placement.rule.megatron: placement.parameter for placement in model_placements}
        mine = {placement.rule.megatron: placement.rule.split(self.places)[0] for placement in model_placements}
        everyone = world.from_all(mine)
        # Reversed, so that of several ranks with the same part the lowest remains.
        self.ranks: dict[tuple[str, int], int] = {
            held: rank for rank, parts in reversed(list(enumerate(everyone))) for held in parts.items()
        }

    def collect(self, info: TensorInfo) -> torch.Tensor | None:
        """The whole tensor on the main process, in the written dtype; None elsewhere. Every rank calls it."""
        rule = self.rules[info.name]
        whole = torch.empty(info.shape, dtype=info.dtype) if self.world.is_main else None
        for part in range(rule.split(self.places)[1]):
            pieces = [piece for piece in rule.pieces(self.places.at(part)) if piece.hf == info.name]
            holder = self.ranks[rule.megatron, part]
            if not pieces or self.world.rank not in (0, holder):
                continue
            if self.world.rank == holder:
                flat = self._pack(self.parameters[rule.megatron], pieces)
                if holder != 0:
                    # Wait for the main process first: it may write for longer than the timeout of a GPU's group.
                    dist.recv(torch.empty(1), src=0, group=self.world.host_group)
                    dist.send(flat, dst=0)
            else:
                count = sum(volume(piece.hf_box) for piece in pieces)
                flat = torch.empty(count, dtype=self.model.config.params_dtype, device=self.world.device)
                dist.send(torch.zeros(1), dst=holder, group=self.world.host_group)
                dist.recv(flat, src=holder)
            if whole is not None:
                _unpack(flat, pieces, whole, info.name)
        return whole

    def _pack(self, parameter: torch.nn.Parameter, pieces: list[Piece]) -> torch.Tensor:
        """All pieces as one flat tensor, so that one message carries them."""
        return torch.cat([parameter.detach()[slices(piece.local_box)].flatten() for piece in pieces])


def _unpack(flat: torch.Tensor, pieces: list[Piece], whole: torch.Tensor, name: str) -> None:
    sizes = [volume(piece.hf_box) for piece in pieces]
    for piece, part in zip(pieces, flat.split(sizes), strict=True):
        target = whole[slices(piece.hf_box)]
        target.copy_(narrowed(part.view(target.shape), whole.dtype, name))


def _present(values: Iterator[torch.Tensor | None]) -> Iterator[torch.Tensor]:
    for value in values:
        assert value is not None  # the main process always gets the tensor
        yield value


def _check_source(source: Path) -> None:
    if not source.is_dir():
        raise UserError(f"{source}: no such folder to copy the tokenizer and generation settings from")


def _tensor_infos(model: GPT, dtypes: Mapping[str, torch.dtype]) -> list[TensorInfo]:
    """The tensors that are written, in the model's order."""
    return [TensorInfo(name, dtypes[name], shape) for name, shape in model.architecture.hf_shapes().items()]


def _dtypes(
    model: GPT, source: Path, dtype: torch.dtype | Mapping[str, torch.dtype] | None
) -> Mapping[str, torch.dtype]:
    if isinstance(dtype, Mapping):
        return dtype
    names = list(model.architecture.hf_shapes())
    if dtype is None and any((source / file).exists() for file in (SINGLE_FILE, INDEX_FILE)):
        folder = HFFolder(source)
        return {name: folder.dtype(name) for name in names}
    if dtype is None:
        config = read_json(source / "config.json") if (source / "config.json").exists() else {}
        named = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
        dtype = named if isinstance(named, torch.dtype) else model.config.params_dtype
    return dict.fromkeys(names, dtype)
