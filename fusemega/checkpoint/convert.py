"""Whole-folder conversions: Hugging Face to Megatron, back, and the proof that nothing changed.

A Megatron folder holds `weights/` (torch_dist, loadable under any layout), `hf/` (config.json, tokenizer and the other
small files, so that the folder stands alone) and `manifest.json`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fusemega.checkpoint.check import check_tensors, is_megatron_folder
from fusemega.checkpoint.hf_export import export_hf
from fusemega.checkpoint.hf_folder import HFFolder, functional_config, read_json
from fusemega.checkpoint.hf_load import load_hf
from fusemega.checkpoint.output import on_main, output_folder, refuse_existing
from fusemega.checkpoint.side_files import MAX_SHARD_SIZE, copy_side_files
from fusemega.checkpoint.torch_dist import load_model, save_model
from fusemega.errors import UserError
from fusemega.models.build import GPT, build_model, placements
from fusemega.models.dense_logits import dense_logits
from fusemega.models.registry import family_of
from fusemega.models.rules import slices, whole
from fusemega.runtime.parallel import World

FORMAT = "fusemega-megatron-1"


class MegatronFolder:
    """A folder that `import_hf` wrote.

    Raises:
        UserError: not such a folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = read_json(self.path / "manifest.json")
        if self.manifest.get("format") != FORMAT:
            found = self.manifest.get("format")
            raise UserError(f"{self.path / 'manifest.json'}: format is {found!r}, expected {FORMAT!r}")
        self.hf = self.path / "hf"
        self.config = read_json(self.hf / "config.json")
        self.dtypes: dict[str, torch.dtype] = {
            name: getattr(torch, dtype) for name, dtype in self.manifest["dtypes"].items()
        }

    def load(self, world: World, dtype: torch.dtype | None = None) -> GPT:
        """The model under this layout, in the stored dtype unless another is asked for. Collective."""
        model = build_model(self.config, world, dtype or _container(set(self.dtypes.values())))
        load_model(model, self.path / "weights")
        return model


def import_hf(source: str | Path, out: str | Path, world: World) -> None:
    """Hugging Face folder to Megatron folder, bit for bit. Collective; any layout gives the same checkpoint.

    Raises:
        UserError: the source is damaged or not supported, `out` is not empty, the disk is full.
    """
    out = Path(out)
    on_main(world, lambda: refuse_existing(out))
    folder = HFFolder(source)
    check_tensors(folder, folder.config)
    names = [name for rule in family_of(folder.config).rules(folder.config) for name in rule.hf_shapes()]
    dtypes = {name: folder.dtype(name) for name in names}
    model = build_model(folder.config, world, _container(set(dtypes.values())))
    load_hf(model, source, world)
    weight_bytes = sum(torch.Size(folder.shape(name)).numel() * dtypes[name].itemsize for name in dtypes)
    with output_folder(out, world, needed_bytes=weight_bytes) as temporary:
        if world.is_main:
            (temporary / "hf").mkdir()
            (temporary / "weights").mkdir()
            copy_side_files(folder.path, temporary / "hf")
            _write_json(temporary / "hf" / "config.json", folder.config)
            manifest = {
                "format": FORMAT,
                "source": str(folder.path),
                "source_hash": folder.content_hash(),
                "dtypes": {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()},
                "versions": {name: version(name) for name in ("torch", "megatron-core", "safetensors")},
            }
            _write_json(temporary / "manifest.json", manifest)
        world.barrier()
        save_model(model, temporary / "weights")


def export_megatron(
    source: str | Path,
    out: str | Path,
    world: World,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """Megatron folder to Hugging Face folder; each tensor in the dtype it was imported from, or in `dtype`. Collective.

    Raises:
        UserError: the source is not a Megatron folder, `out` is not empty, the disk is full.
    """
    out = Path(out)
    on_main(world, lambda: refuse_existing(out))
    folder = MegatronFolder(source)
    model = folder.load(world)
    export_hf(model, out, folder.hf, world, dtype=dtype or folder.dtypes, max_shard_size=max_shard_size)


@dataclass(frozen=True)
class Comparison:
    """What `verify` found.

    Attributes:
        tensors: how many HF tensors were compared.
        different: names of those whose shape, dtype (between two HF folders) or any bit differs.
        missing: names that only one side has.
        config: keys of config.json whose values differ, other than those about storage.
        max_logit_difference: largest absolute difference of fp32 logits, where a text was given.
    """

    tensors: int
    different: list[str]
    missing: list[str]
    config: list[str]
    max_logit_difference: float | None

    @property
    def identical(self) -> bool:
        return not (self.different or self.missing or self.config)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"identical": self.identical}


def verify(hf: str | Path, other: str | Path, world: World, text: str | None = None) -> Comparison:
    """Compare a Hugging Face folder with another, or with a Megatron folder, bit for bit. Collective.

    Args:
        hf: a Hugging Face folder, whose tokenizer is used for `text`.
        other: a Hugging Face or Megatron folder.
        world: the layout in which a Megatron folder is read.
        text: when given, logits of both sides on it are compared too, in fp32; transformers computes those of an HF
            folder.

    Raises:
        UserError: a folder is damaged, or the two are not of one architecture.
    """
    folder = HFFolder(hf)
    check_tensors(folder, folder.config)
    opened = MegatronFolder(other) if is_megatron_folder(other) else HFFolder(other)
    ours, theirs = functional_config(folder.config), functional_config(opened.config)
    config = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
    if isinstance(opened, MegatronFolder):
        compared, different, missing = _compare_megatron(folder, opened, world)
    else:
        compared, different, missing = _compare_hf(folder, opened)
    difference = None if text is None else _compare_logits(folder, Path(other), world, text)
    return Comparison(compared, sorted(different), sorted(missing), config, difference)


def _compare_hf(ours: HFFolder, theirs: HFFolder) -> tuple[int, set[str], set[str]]:
    """Tensors that a family may leave out (copies, old buffers) count as equal where one side lacks them."""
    family = family_of(ours.config)
    check_tensors(theirs, theirs.config)
    optional = {name for name in {*ours, *theirs} if family.ignorable(name)}
    optional |= family.copies(ours.config).keys()
    mine, other = set(ours), set(theirs)
    different = set()
    for name in mine & other:
        box = whole(ours.shape(name))
        same_form = ours.shape(name) == theirs.shape(name) and ours.dtype(name) == theirs.dtype(name)
        if not same_form or not _same_bits(ours.read(name, box), theirs.read(name, box)):
            different.add(name)
    return len(mine & other), different, (mine ^ other) - optional


def _compare_megatron(folder: HFFolder, megatron: MegatronFolder, world: World) -> tuple[int, set[str], set[str]]:
    names = set(megatron.dtypes)
    family = family_of(folder.config)
    expected = {name for rule in family.rules(folder.config) for name in rule.hf_shapes()}
    missing = names ^ expected
    model = megatron.load(world)
    different: set[str] = set()
    for placement in placements(model, world):
        for piece in placement.pieces:
            if piece.hf in missing or piece.hf in different:
                continue
            here = placement.parameter.detach()[slices(piece.local_box)].cpu()
            if placement.rule.hf_shapes()[piece.hf] != folder.shape(piece.hf) or not _same_bits(
                here, folder.read(piece.hf, piece.hf_box)
            ):
                different.add(piece.hf)
    everyone: list[set[str]] = [set()] * world.world_size
    dist.all_gather_object(everyone, different)
    return len(names & expected), set().union(*everyone), missing


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal after the exact conversion to the wider of the two types; NaNs and signed zeros by their bits."""
    wide = torch.promote_types(a.dtype, b.dtype)
    a, b = a.to(wide).contiguous(), b.to(wide).contiguous()
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _compare_logits(folder: HFFolder, other: Path, world: World, text: str) -> float:
    """The largest difference on the main process and every other."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder.path)(text)["input_ids"]
    ids = ids[: len(ids) // world.tp_size * world.tp_size]  # sequence parallelism splits tokens evenly
    if not ids:
        raise UserError(f"text {text!r}: no tokens to compare logits on")
    ours_SV = transformers_logits(folder.path, ids)
    if is_megatron_folder(other):
        theirs_SV = dense_logits(MegatronFolder(other).load(world, torch.float32), world, [ids])
    else:
        theirs_SV = transformers_logits(other, ids)
    largest = 0.0 if theirs_SV is None else float((ours_SV - theirs_SV.cpu()).abs().max())
    everyone: list[float] = [0.0] * world.world_size
    dist.all_gather_object(everyone, largest)
    return max(everyone)


@torch.no_grad()
def transformers_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """fp32 logits [S, V] of one text, computed by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(torch.tensor([ids])).logits[0]


def _container(dtypes: set[torch.dtype]) -> torch.dtype:
    """One parameter type that holds all of these exactly."""
    first, *rest = sorted(dtypes, key=str)
    for dtype in rest:
        first = torch.promote_types(first, dtype)
    return first


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
