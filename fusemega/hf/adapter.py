"""LoRA adapters (Hu et al., 2021, arXiv:2106.09685) in peft's form, merged into their base.

    W' = W + s B A        s = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`

for each module that has a pair of A [r, in] and B [out, r]; `rank_pattern` and `alpha_pattern` give modules an r and an
alpha of their own. An embedding's pair is added transposed: A [r, V], B [H, r]. Modules of `modules_to_save` and
trained biases stand in the adapter whole, and take the place of the base's. Sums are in fp32, rounded once.

Any other setting of an adapter's configuration is refused, unless it is listed here as one that does not change the
merged weights. So a new kind of adapter is not merged as an old one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fusemega.errors import UserError, nearest
from fusemega.files.boxes import whole
from fusemega.files.integrity import write_integrity
from fusemega.files.json_files import read_json
from fusemega.files.output import new_folder, refuse_existing
from fusemega.files.safetensors_header import read_header
from fusemega.hf.check import check_copies, check_tensors
from fusemega.hf.folder import DTYPES, HFFolder
from fusemega.hf.loadable import settle
from fusemega.hf.proof import check_written
from fusemega.hf.safetensors_writer import MAX_SHARD_SIZE, TensorInfo, plan_shards, write_file, write_index
from fusemega.hf.side_files import copy_side_files, exported_config, write_config
from fusemega.runtime.meter import meter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PAIR = re.compile(r"(.+)\.lora_(?:(embedding)_)?([AB])(?:\.weight)?")
_REPEAT, _CHOICE, _REPEATED_GROUP = re.compile(r"[*+{]"), re.compile(r"(?<!\()[?|]"), re.compile(r"\)[*+?{]")
_USED = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
# Settings of training, or of the choice of modules, which the tensors show themselves; fan_in_fan_out does not matter
# for torch's Linear, and there are no other layers here.
_INERT = {
    *("auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out", "inference_mode"),
    *("layers_pattern", "layers_to_transform", "lora_dropout", "modules_to_save", "peft_version", "revision"),
    *("runtime_config", "target_modules", "task_type", "loftq_config", "eva_config", "megatron_core"),
    "qalora_group_size",  # peft writes 16 into every adapter; it means something with use_qalora, which is refused
}
# Initialisations that leave the base as it was; with the others (pissa, olora, corda, loftq...) it is changed too.
_INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")


def split_name(name: str) -> tuple[str, str] | None:
    """BASE and ADAPTER of `BASE+ADAPTER`, as mergekit writes it; None where it is not of that form."""
    if Path(name).exists():
        return None
    cuts = [(name[: found.start()], name[found.end() :]) for found in re.finditer(r"\+", name)]
    cuts = [pair for pair in cuts if all(pair)]
    return next((pair for pair in cuts if Path(pair[0]).is_dir()), cuts[-1] if cuts else None)


class Adapter:
    """A LoRA adapter, read whole (adapters are small) and checked against its base.

    Args:
        path: its folder.
        base: the model that it was trained on.

    Raises:
        UserError: no adapter, a setting that is not supported, tensors that do not fit the base.
    """

    def __init__(self, path: Path, base: HFFolder) -> None:
        self.path, self.base = path, base
        config = read_json(path / CONFIG)
        self._scale_of = _scales(config, path / CONFIG)
        self._pairs: dict[str, tuple[torch.Tensor, torch.Tensor, float, bool]] = {}
        self._replaced: dict[str, torch.Tensor] = {}
        tensors = self._read()
        halves: dict[tuple[str, bool], dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            short = name.removeprefix(_PREFIX)
            if short == name:
                raise UserError(f"{path / WEIGHTS}: tensor {name}: expected a name that begins with {_PREFIX}")
            pair = _PAIR.fullmatch(short)
            if pair:
                halves.setdefault((pair[1], pair[2] is not None), {})[pair[3]] = value
            else:
                plain = re.sub(r"\.(base_layer|modules_to_save(\.default)?|original_module)\.", ".", short)
                self._fits(plain, tuple(value.shape), name)
                self._replaced[plain] = value
        for (module, embedding), pair_of in halves.items():
            self._add_pair(module, embedding, pair_of)
        if not self._pairs and not self._replaced:
            raise UserError(f"{path / WEIGHTS}: holds no tensors")

    def merged(self, name: str) -> torch.Tensor:
        """A tensor of the base with the adapter merged: in fp32 (or wider) if it changes, otherwise as in the base."""
        value = self._replaced.get(name)
        value = self.base.read(name, whole(self.base.shape(name))) if value is None else value
        if name not in self._pairs:
            return value
        a, b, scale, embedding = self._pairs[name]
        wide = torch.promote_types(value.dtype, torch.float32)
        product = b.to(wide) @ a.to(wide)
        return torch.add(value.to(wide), product.T if embedding else product, alpha=scale)

    @property
    def changed(self) -> int:
        """Number of tensors of the base that the adapter changes."""
        return len(self._pairs.keys() | self._replaced.keys())

    def _read(self) -> dict[str, torch.Tensor]:
        file = self.path / WEIGHTS
        if not file.is_file():
            raise UserError(f"{file}: missing (a pickled adapter_model.bin is refused: loading it runs code)")
        for found in read_header(file):
            if found.dtype not in DTYPES:
                raise UserError(f"{file}: tensor {found.name} is of type {found.dtype}; supported: {', '.join(DTYPES)}")
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: cannot read: {error}") from None

    def _add_pair(self, module: str, embedding: bool, halves: dict[str, torch.Tensor]) -> None:
        file, name = self.path / WEIGHTS, f"{module}.weight"
        if halves.keys() != {"A", "B"}:
            raise UserError(f"{file}: {module} has lora_{next(iter(halves))} alone; expected lora_A and lora_B")
        a, b = halves["A"], halves["B"]
        if name not in self.base:
            raise self._unknown(name, f"{_PREFIX}{module}.lora_B A")
        rank, scale = self._scale_of(module)
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise UserError(
                f"{file}: {module}: A is {list(a.shape)} and B is {list(b.shape)}, and r is {rank} in {CONFIG}"
            )
        shape = (a.shape[1], b.shape[0]) if embedding else (b.shape[0], a.shape[1])
        self._fits(name, shape, f"{_PREFIX}{module}.lora_B A")
        self._pairs[name] = a, b, scale, embedding

    def _fits(self, name: str, shape: tuple[int, ...], given: str) -> None:
        if name not in self.base:
            raise self._unknown(name, given)
        if self.base.shape(name) != shape:
            raise UserError(
                f"{self.path / WEIGHTS}: {given} is {list(shape)}, and {name} is {list(self.base.shape(name))} in "
                f"{self.base.path}: of another base, or of one with more tokens"
            )

    def _unknown(self, name: str, given: str) -> UserError:
        tied = " (its head is its embedding, which the adapter would change too)" if "lm_head" in name else ""
        return UserError(
            f"{self.path / WEIGHTS}: {given}: {self.base.path} has no tensor {name}{tied}{nearest(name, self.base)}"
        )


def merge_adapter(base: Path, adapter: Path, out: Path, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Writes base + adapter as a Hugging Face folder. Holds the adapter, and one tensor of the base at a time.

    Args:
        base: a Hugging Face folder.
        adapter: an adapter's folder in peft's form.
        out: absent or empty; appears complete or not at all.
        dtype: dtype of the written weights; None: the base's.

    Returns:
        How many tensors were changed, and of how many; the notes of `settle`.

    Raises:
        UserError: see `Adapter`; values that are not finite in `dtype`; `out` does not appear then.
    """
    refuse_existing(out)
    source = HFFolder(base)
    check_tensors(source)
    check_written(source)
    check_copies(source)
    lora = Adapter(adapter, source)
    infos = [TensorInfo(name, dtype or source.dtype(name), source.shape(name)) for name in source]
    needed = sum(info.nbytes for info in infos)

    def values(shard: list[TensorInfo], done: Callable[[int], None]) -> Iterator[torch.Tensor]:
        for info in shard:
            value = lora.merged(info.name).to(info.dtype)
            if not torch.isfinite(value).all():
                raise UserError(f"{adapter}: {info.name} with the adapter in it is not finite in {info.dtype}")
            yield value
            done(info.nbytes)

    with new_folder(out, needed) as temporary, meter("merging the adapter", needed) as progress:
        shards = plan_shards(infos, MAX_SHARD_SIZE)
        for file, shard in shards.items():
            write_file(temporary / file, shard, values(shard, progress.add))
        write_index(temporary, shards)
        copy_side_files(base, temporary)
        own = (adapter / "tokenizer.json").is_file()  # the one that it was trained with
        if own:
            copy_side_files(adapter, temporary)
        write_config(temporary, exported_config(source.config, infos[0].dtype), sort_keys=True)
        notes = settle(temporary, adapter if own else base, chats=True)
        write_integrity(temporary)
    return {"notes": notes, "changed": lora.changed, "tensors": len(infos)}


def _scales(config: dict[str, Any], file: Path) -> Callable[[str], tuple[int, float]]:
    """A function from a module's name to its r and the factor s of its product.

    Raises:
        UserError: another kind of adapter, or a setting that is not supported.
    """
    if config.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type is {config.get('peft_type')!r}; supported: LORA")
    for key, value in config.items():
        if key == "init_lora_weights":
            if value not in _INITIAL:
                raise UserError(f"{file}: init_lora_weights {value!r} changes the base too; supported: the default")
        elif key not in _USED | _INERT and value not in (None, False, 0, "", [], {}):
            raise UserError(f"{file}: {key} = {value!r} is not supported, and may change the merged weights")
    if config.get("loftq_config"):
        raise UserError(f"{file}: loftq_config: LoftQ changes the base too, and is not supported")
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for key, found in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not isinstance(found, dict):
            raise UserError(f"{file}: {key} is {found!r}; expected an object: pattern -> number")
    for name, found, least in (("r", {"r": config.get("r")} | ranks, 1), ("lora_alpha", alphas, 0)):
        for key, value in found.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < 1e6:
                raise UserError(f"{file}: {name} of {key} is {value!r}; expected a number from {least} to 10^6")
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha < 1e6:
        raise UserError(f"{file}: lora_alpha is {alpha!r}; expected a number from 0 to 10^6")

    def scale_of(module: str) -> tuple[int, float]:
        rank = int(_by_pattern(ranks, module, config["r"], file))
        own = float(_by_pattern(alphas, module, alpha, file))
        return rank, own / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return scale_of


def _by_pattern(patterns: dict[str, Any], module: str, otherwise: Any, file: Path) -> Any:
    """peft's rule: the first pattern that fits the end of the module's name, at a dot."""
    for pattern, value in patterns.items():
        # An expression made to backtrack takes any time: its choices multiply.
        many = len(_REPEAT.findall(pattern)) > 3 or len(_CHOICE.findall(pattern)) > 8
        if many or len(pattern) > 256 or _REPEATED_GROUP.search(pattern):
            raise UserError(
                f"{file}: the pattern {pattern[:80]!r} may take too long; allowed: 256 characters, three of * + {{, "
                "eight of ? |, and no group that is repeated"
            )
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except (re.error, OverflowError) as error:
            raise UserError(f"{file}: the pattern {pattern!r} is not a regular expression: {error}") from None
    return otherwise
