"""The folder that `fusemega convert import` writes, and a run's checkpoint: each stands alone.

weights/         torch_dist, loadable under any layout
hf/              config.json, tokenizer and the other small files
manifest.json    where the weights came from
integrity.json   sizes and hashes of all of these

A run's checkpoint has the same but for `weights/`: the files of torch_dist lie in the folder itself, and hold optimizer
state too. Where that has fp32 main parameters, they are the weights.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from fusemega.checkpoint.series import STATE, checkpoint_named, checkpoints_below, latest_checkpoint, read_state
from fusemega.errors import UserError, choose
from fusemega.files.integrity import FILE as INTEGRITY
from fusemega.files.integrity import check_sizes, damaged_files, recorded_hashes
from fusemega.files.json_files import read_json
from fusemega.hf.folder import DTYPES, HFFolder
from fusemega.hf.side_files import copy_side_files, write_template
from fusemega.models.architecture import Architecture
from fusemega.models.registry import architecture_of

if TYPE_CHECKING:  # megatron-core takes seconds to import, and conversions do without it
    from fusemega.models.build import GPT
    from fusemega.runtime.parallel import World
    from fusemega.runtime.precision import Kernels

FORMAT = "fusemega-megatron-2"
_RUN_FORMAT = "fusemega-checkpoint-1"
MANIFEST = "manifest.json"


class MegatronFolder:
    """An imported folder, its files checked for their sizes.

    Attributes:
        path, weights, hf: the folder and its parts.
        config: the model's `config.json`.
        dtypes: type of each tensor of the Hugging Face folder that the weights come from.
        content_hash: hash, 32 hex digits, of configuration and weights; an imported folder has that of its source.

    Raises:
        UserError: not such a folder, or a file of it is missing or truncated.
    """

    _format, _remedy = FORMAT, "import it again"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = read_json(self.path / MANIFEST)
        if self.manifest.get("format") != self._format:
            found = self.manifest.get("format")
            raise UserError(f"{self.path / MANIFEST}: format is {found!r}, expected {self._format!r}; {self._remedy}")
        self.weights = self._weights()
        self.hf = self.path / "hf"
        self.config = read_json(self.hf / "config.json")
        self.dtypes = self._dtypes()
        self.content_hash = self._content_hash()
        check_sizes(self.path)

    @cached_property
    def architecture(self) -> Architecture:
        """The architecture in its configuration, read when it is first asked for.

        Raises:
            UserError: the configuration is refused.
        """
        return architecture_of(self.config)

    def _weights(self) -> Path:
        return self.path / "weights"

    def _content_hash(self) -> str:
        source_hash = self.manifest.get("source_hash")
        if not isinstance(source_hash, str) or not re.fullmatch("[0-9a-f]{32}", source_hash):  # folders are named by it
            raise UserError(f"{self.path / MANIFEST}: source_hash is {source_hash!r}, expected 32 hex digits")
        return source_hash

    def _dtypes(self) -> dict[str, torch.dtype]:
        """The type of each tensor when it was imported."""
        given = self.manifest.get("dtypes")
        if not isinstance(given, dict) or not given:
            raise UserError(f"{self.path / MANIFEST}: dtypes is not a mapping of tensors to types")
        known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
        where = f"{self.path / MANIFEST}: dtypes"
        return {name: known[choose(f"{where}.{name}", str(dtype), known)] for name, dtype in given.items()}

    @property
    def dtype(self) -> torch.dtype:
        """One type that holds the values of every tensor exactly."""
        return common_dtype(self.dtypes.values())

    def load(
        self,
        world: World,
        dtype: torch.dtype | None = None,
        kernels: Kernels | None = None,
        recompute: Mapping[str, Any] = MappingProxyType({}),
    ) -> GPT:
        """The model under this layout, in the stored dtype unless another is asked for. Collective.

        Raises:
            UserError: a file is damaged; every byte is compared with its recorded hash, a share of the files a rank.
        """
        from fusemega.checkpoint.torch_dist import load_model
        from fusemega.models.build import build_model
        from fusemega.runtime.precision import LOCAL

        found = world.from_all(damaged_files(self.path, share=(world.rank, world.world_size)))
        for name in sorted(sum(found, [])):
            raise UserError(f"{self.path / name}: damaged: its hash differs from the one in {INTEGRITY}")
        model = build_model(self.architecture, world, dtype or self.dtype, kernels or LOCAL, recompute)
        load_model(model, self.weights)
        return model


class RunCheckpoint(MegatronFolder):
    """A checkpoint of a training run, as a model.

    Its `content_hash` covers the files as they were written, so a model exported from it has another hash.

    Attributes:
        iteration: number of updates before it was saved.
        chats: whether the model was taught to close the turns of conversations.
    """

    _format, _remedy = _RUN_FORMAT, "resume the run with the version that began it, or export it there"

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.iteration = int(read_state(self.path)["iteration"])
        self.chats = self.manifest.get("chats") is True

    def _weights(self) -> Path:
        return self.path

    def _content_hash(self) -> str:
        hashes = json.dumps(sorted(recorded_hashes(self.path).items()))
        return hashlib.blake2b(hashes.encode(), digest_size=16).hexdigest()


def is_megatron_folder(path: str | Path) -> bool:
    """Whether `path` has the form of an imported folder, a run, its `checkpoints` or one of these."""
    path = Path(path)
    imported = (path / MANIFEST).is_file() and (path / "weights").is_dir()
    return imported or _is_checkpoint(path) or checkpoints_below(path) is not None


def _is_checkpoint(path: Path) -> bool:
    return (path / STATE).is_file() and not (path / "config.json").exists()


def open_megatron(path: str | Path, iteration: int | None = None) -> MegatronFolder:
    """Opens an imported folder, or a checkpoint of a run: by default the newest complete one.

    Args:
        path: an imported folder, a run's folder or its `checkpoints`, or a checkpoint itself.
        iteration: the checkpoint of a run to open instead of the newest.

    Raises:
        UserError: as `MegatronFolder`; the run has no (such) checkpoint; `iteration` is given for another folder.
    """
    path = Path(path)
    root = checkpoints_below(path)
    if root is None:
        if iteration is not None:
            raise UserError(f"{path}: is no run, and has no iteration {iteration}; allowed: a run's folder")
        return RunCheckpoint(path) if _is_checkpoint(path) else MegatronFolder(path)
    found = latest_checkpoint(root) if iteration is None else checkpoint_named(root, iteration)
    if found is None:
        raise UserError(f"{path}: the run has no checkpoint yet")
    return RunCheckpoint(found)


def describe_run(
    folder: Path,
    hf: Path,
    config: Mapping[str, Any],
    dtypes: Mapping[str, torch.dtype],
    chats: bool,
    chat_template: str | None = None,
) -> None:
    """Write `hf/` and `manifest.json` of a checkpoint that is being written.

    Args:
        folder: the checkpoint's folder.
        hf: folder with the small files of the model in training.
        config: the model's configuration.
        dtypes: types of the tensors that it was loaded from.
        chats: whether it is taught to close the turns of conversations.
        chat_template: template with which it is trained, in place of its own.
    """
    (folder / "hf").mkdir(exist_ok=True)
    copy_side_files(hf, folder / "hf")
    if chat_template is not None:
        write_template(folder / "hf", chat_template)
    (folder / "hf" / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
    manifest = {
        "format": _RUN_FORMAT,
        "dtypes": {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()},
        "chats": chats,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def describe_source(folder: Path, source: HFFolder, names: Iterable[str], digests: Mapping[str, str]) -> None:
    """Write `hf/` and `manifest.json` of a folder that is being imported.

    Args:
        folder: the folder being written.
        source: what is imported.
        names: those of its tensors that are stored.
        digests: XXH3-128 of its tensors, as far as they are known.
    """
    (folder / "hf").mkdir(exist_ok=True)
    copy_side_files(source.path, folder / "hf")
    manifest = {
        "format": FORMAT,
        "source": str(source.path),
        "source_hash": source.content_hash(digests),
        "dtypes": {name: str(source.dtype(name)).removeprefix("torch.") for name in names},
        "versions": {name: version(name) for name in ("torch", "megatron-core", "safetensors")},
    }
    for path, value in ((folder / "hf" / "config.json", source.config), (folder / MANIFEST, manifest)):
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def common_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """One type that holds all of these exactly."""
    first, *rest = sorted(set(dtypes), key=str)
    for dtype in rest:
        first = torch.promote_types(first, dtype)
    return first
