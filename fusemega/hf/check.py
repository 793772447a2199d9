"""Checks that a Hugging Face folder has exactly the tensors that its configuration requires."""

from __future__ import annotations

import torch

from fusemega.errors import UserError, nearest
from fusemega.hf.folder import HFFolder
from fusemega.models.architecture import Architecture


def check_tensors(folder: HFFolder, architecture: Architecture | None = None) -> None:
    """Checks that the folder holds exactly the tensors of its architecture, with their shapes. Reads no weights.

    Args:
        folder: an open folder.
        architecture: used in place of the folder's own.

    Raises:
        UserError: names the first tensor that is missing, unexpected, or of another shape or type.
    """
    architecture = architecture or folder.architecture
    expected = architecture.hf_shapes()
    copies = {copy: expected[original] for copy, original in architecture.copies().items() if copy in folder}
    present = {name for name in folder if not architecture.ignorable(name)}
    for name, shape in (expected | copies).items():
        if name not in present:
            raise UserError(f"{folder.path}: tensor {name} is missing{nearest(name, present - expected.keys())}")
        if folder.shape(name) != shape:
            raise UserError(
                f"{folder.path}: tensor {name} has shape {list(folder.shape(name))}, and config.json says {list(shape)}"
            )
        folder.dtype(name)  # raises for quantised weights
    for name in sorted(present - expected.keys() - copies.keys()):
        raise UserError(f"{folder.path}: tensor {name} is not part of this architecture")


def check_copies(folder: HFFolder) -> None:
    """Checks that the head of a tied model's folder, if it is there, equals the embedding. Reads both, block by block.

    Raises:
        UserError: they differ.
    """
    for copy, original in folder.architecture.copies().items():
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
