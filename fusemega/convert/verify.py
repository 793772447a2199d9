"""Verifies that a conversion changed nothing: bit for bit over any two folders, and by logits on a text.

Shape suffixes: S tokens, V vocabulary; a scalar head has [1, 1] in its place, and H is a hidden size.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fusemega.checkpoint.megatron_folder import is_megatron_folder, open_megatron
from fusemega.checkpoint.torch_dist_files import Checkpoint
from fusemega.convert.copying import same_bits
from fusemega.errors import UserError
from fusemega.files.integrity import FILE as INTEGRITY
from fusemega.files.integrity import damaged_files
from fusemega.files.moves import Assembled, as_is
from fusemega.files.tokenizer_files import load_pretrained
from fusemega.hf.check import check_tensors
from fusemega.hf.folder import HFFolder, functional_config
from fusemega.hf.proof import damaged_weights
from fusemega.models.architecture import Architecture
from fusemega.models.heads import HeadKind
from fusemega.runtime.meter import meter
from fusemega.runtime.workers import start_workers

if TYPE_CHECKING:
    from fusemega.runtime.parallel import World

MAX_TEXT_TOKENS = 512


@dataclass(frozen=True)
class Differences:
    """What `verify` found.

    Attributes:
        tensors: how many HF tensors were compared.
        different: names of those whose shape, dtype or any bit differs.
        missing: names that only one side has.
        config: keys of config.json whose values differ, other than those about storage.
        damaged: files whose bytes are not those that their folder's integrity manifest describes.
        byte_count: bytes of the compared weights on one side.
        peak_bytes: the most resident memory of all processes together.
    """

    tensors: int
    different: list[str]
    missing: list[str]
    config: list[str]
    damaged: list[str]
    byte_count: int
    peak_bytes: int

    @property
    def identical(self) -> bool:
        return not (self.different or self.missing or self.config or self.damaged)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"identical": self.identical}


class _Side:
    """One of the two folders, as HF tensors."""

    def __init__(self, path: str | Path) -> None:
        self.damaged: list[str] = []
        self.tensors: dict[str, Assembled]
        self.dtypes: dict[str, torch.dtype]
        if is_megatron_folder(path):
            megatron = open_megatron(path)
            self.config, self.architecture = megatron.config, megatron.architecture
            self.tensors = Checkpoint(megatron.weights).hf_tensors(megatron.architecture)
            self.dtypes = megatron.dtypes
            self.damaged = [str(megatron.path / name) for name in damaged_files(megatron.path)]
        else:
            folder = HFFolder(path)
            check_tensors(folder)
            self.config, self.architecture = folder.config, folder.architecture
            if (folder.path / INTEGRITY).is_file():
                self.damaged = [str(folder.path / name) for name in damaged_weights(folder, again=True)]
            names = [name for name in folder if not self.architecture.ignorable(name)]
            self.tensors = {name: as_is(folder.stored(name)) for name in names}
            self.dtypes = {name: folder.dtype(name) for name in names}


def verify(hf: str | Path, other: str | Path, *, workers: int = 1) -> Differences:
    """Compare two folders, each of Hugging Face's or Megatron's form, bit for bit. One process calls it.

    Tensors that a family may leave out (copies, old buffers) count as equal where one side lacks them.

    Raises:
        UserError: a folder is damaged beyond reading, or its tensors are not those of its configuration.
    """
    ours, theirs = _Side(hf), _Side(other)
    mine, yours = functional_config(ours.config), functional_config(theirs.config)
    config = [key for key in sorted(mine.keys() | yours.keys()) if mine.get(key) != yours.get(key)]
    optional = ours.architecture.copies().keys()
    common = sorted(ours.tensors.keys() & theirs.tensors.keys())
    missing = sorted((ours.tensors.keys() ^ theirs.tensors.keys()) - optional)
    different = []
    pairs = []
    for name in common:
        a, b = ours.tensors[name], theirs.tensors[name]
        if a.shape != b.shape or ours.dtypes[name] != theirs.dtypes[name]:
            different.append(name)
        else:
            pairs.append(_in_one_type(a, b))
    byte_count = sum(pair[0].nbytes for pair in pairs)
    with start_workers(workers) as pool:
        with meter("comparing", byte_count) as done:
            for (a, _), same in pool.map(same_bits, sorted(pairs, key=lambda pair: -pair[0].nbytes)):
                done.add(a.nbytes)
                if not same:
                    different.append(a.name)
        peak_bytes = pool.peak_bytes
    damaged = ours.damaged + theirs.damaged
    return Differences(len(common), sorted(different), missing, config, damaged, byte_count, peak_bytes)


def _in_one_type(a: Assembled, b: Assembled) -> tuple[Assembled, Assembled]:
    """The two tensors in the wider of their stored types, to which each converts exactly."""
    wide = str(torch.promote_types(getattr(torch, a.dtype), getattr(torch, b.dtype))).removeprefix("torch.")
    return Assembled(a.name, a.shape, wide, a.moves), Assembled(b.name, b.shape, wide, b.moves)


def logit_difference(hf: str | Path, other: str | Path, world: World, text: str) -> float:
    """The largest absolute difference of the two folders' fp32 logits on the first tokens of a text. Collective.

    Models with a scalar head are compared by their scores of the text, models without a head by their hidden states.

    For an HF folder transformers computes the logits, for a Megatron folder Megatron under this layout. Each holds its
    whole model in fp32.

    Args:
        hf, other: as in `verify`; the first one's tokenizer is used.
        world: the layout.
        text: cut to 512 tokens.

    Raises:
        UserError: no tokens, or vocabularies of different sizes.
    """
    tokenizer = load_pretrained(open_megatron(hf).hf if is_megatron_folder(hf) else hf)
    ids = tokenizer(text)["input_ids"][:MAX_TEXT_TOKENS]
    ids = ids[: len(ids) // world.tp_size * world.tp_size]  # sequence parallelism splits tokens evenly
    if not ids:
        raise UserError(f"text {text[:40]!r}: no tokens to compare logits on")
    ours_SV, theirs_SV = _logits(hf, world, ids), _logits(other, world, ids)
    largest = 0.0
    if ours_SV is not None and theirs_SV is not None:
        if ours_SV.shape != theirs_SV.shape:
            raise UserError(f"{other}: {theirs_SV.shape[1]} logits a token, and {hf} has {ours_SV.shape[1]}")
        largest = float((ours_SV - theirs_SV).abs().max())
    return max(world.from_all(largest))


def _logits(folder: str | Path, world: World, ids: list[int]) -> torch.Tensor | None:
    """Logits [S, V] on the CPU; for a Megatron folder on its last pipeline stage only, elsewhere None."""
    if not is_megatron_folder(folder):
        return transformers_logits(Path(folder), ids, HFFolder(folder).architecture)
    from fusemega.models.dense_logits import dense_logits

    opened = open_megatron(folder)
    logits_SV = dense_logits(opened.load(world, torch.float32), world, [ids])
    if logits_SV is not None and opened.architecture.head == "scalar":
        logits_SV = logits_SV[-1:]  # transformers gives the last token's alone
    return None if logits_SV is None else logits_SV.cpu()


@torch.no_grad()
def transformers_logits(folder: Path, ids: list[int], architecture: Architecture) -> torch.Tensor:
    """fp32 logits [S, V] of one text, computed by transformers; [1, 1] of a score, [S, H] of hidden states.

    Raises:
        UserError: transformers does not know such layers.
    """
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    if architecture.family.auto_map:
        raise UserError(
            f"{folder}: transformers has no such class without the code in the model's folder, which is never run; "
            "allowed: no text"
        )
    if not architecture.complete:
        raise UserError(
            f"{folder}: block_configs of config.json leaves out blocks, which transformers would fill at random; "
            f"allowed: folders without it, or no text"
        )
    if architecture.head == "gated":
        raise UserError(
            f"{folder}: transformers has no such class without the code in the model's folder, which is never run; "
            "allowed: no text"
        )
    kinds: dict[HeadKind, Any] = {
        "vocabulary": AutoModelForCausalLM,
        "scalar": AutoModelForSequenceClassification,
        "none": AutoModel,
    }
    model = kinds[architecture.head].from_pretrained(folder, dtype=torch.float32).eval()
    model.config.pad_token_id = None  # a text that ends in a token used for padding is still scored at its end
    out = model(torch.tensor([ids]))
    values: torch.Tensor = (out.last_hidden_state if architecture.head == "none" else out.logits)[0]
    return values if architecture.head != "scalar" else values[None]
