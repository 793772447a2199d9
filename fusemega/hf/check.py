"""Whether a Hugging Face folder's tensors are those its configuration asks for."""

from __future__ import annotations

import torch

from fusemega.errors import UserError, nearest
from fusemega.hf.folder import HFFolder
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


def check_copies(folder: HFFolder) -> None:
    """A tied model's folder may hold its head too; then it must be the embedding. Reads both, block by block.

    Raises:
        UserError: it is not.
    """
    for copy, original in family_of(folder.config).copies(folder.config).items():
        if copy not in folder:
            continue
        rows, columns = folder.shape(original)
        step = max(1, (1 << 22) // columns)
        for start in range(0, rows, step):
            box = ((start, min(start + step, rows)), (0, columns))
            if not torch.equal(folder.read(copy, box), folder.read(original, box)):
                raise UserError(
                    f"{folder.path}: config.json ties the head to the embedding, but {copy} differs from {original}"
                )
