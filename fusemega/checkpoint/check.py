"""What a folder is, and whether it holds what its configuration says; apart from loaders, so without Megatron-core."""

from __future__ import annotations

from pathlib import Path

from fusemega.checkpoint.hf_folder import HFFolder
from fusemega.errors import UserError, nearest
from fusemega.models.family import HFConfig
from fusemega.models.registry import family_of


def check_tensors(folder: HFFolder, hf_config: HFConfig) -> None:
    """The folder holds exactly the tensors the configuration asks for, with those shapes. Reads no weights.

    Raises:
        UserError: names the first tensor that is missing, unexpected, or of another shape or type.
    """
    family = family_of(hf_config)
    expected = {name: shape for rule in family.rules(hf_config) for name, shape in rule.hf_shapes().items()}
    copies = {copy: expected[original] for copy, original in family.copies(hf_config).items() if copy in folder}
    present = {name for name in folder if not family.ignorable(name)}
    for name, shape in (expected | copies).items():
        if name not in present:
            raise UserError(f"{folder.path}: tensor {name} is missing{nearest(name, present - expected.keys())}")
        if folder.shape(name) != shape:
            raise UserError(
                f"{folder.path}: tensor {name} has shape {list(folder.shape(name))}, and config.json says {list(shape)}"
            )
        folder.dtype(name)
    for name in sorted(present - expected.keys() - copies.keys()):
        raise UserError(f"{folder.path}: tensor {name} belongs to no part of this architecture")


def is_megatron_folder(path: str | Path) -> bool:
    """Whether `path` has the form `import_hf` writes."""
    return (Path(path) / "manifest.json").is_file() and (Path(path) / "weights").is_dir()
