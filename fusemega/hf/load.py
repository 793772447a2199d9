"""Loads a Hugging Face folder into a Megatron model; each rank reads only its own slices."""

from __future__ import annotations

from pathlib import Path

import torch

from fusemega.errors import UserError
from fusemega.hf.check import check_tensors
from fusemega.hf.folder import HFFolder
from fusemega.models.build import GPT, fill, placements
from fusemega.runtime.parallel import World


def load_hf(model: GPT, folder: str | Path | HFFolder, world: World) -> None:
    """Fill a model from a folder. Weights are converted to the model's dtype (rounded to nearest even if narrower).

    Args:
        model: from `build_model`; its configuration, not the folder's, says which tensors are wanted.
        folder: a local Hugging Face folder, or one that is open.
        world: the layout the model was built for.

    Raises:
        UserError: the folder is damaged or does not fit; nothing has been changed then, except where a tied model's
            folder turns out to hold a head that differs from the embedding.
    """
    source = folder if isinstance(folder, HFFolder) else HFFolder(folder)
    check_tensors(source, model.architecture)
    fill(model, world, source.read)
    _check_copies(model, source, world)


def _check_copies(model: GPT, source: HFFolder, world: World) -> None:
    """Checks that the head of a tied model's folder, if there, equals the embedding on the rows this rank has read."""
    copies = {original: copy for copy, original in model.architecture.copies().items() if copy in source}
    for placement in placements(model, world):
        for piece in placement.pieces:
            copy = copies.get(piece.hf)
            if copy and not torch.equal(source.read(piece.hf, piece.hf_box), source.read(copy, piece.hf_box)):
                raise UserError(
                    f"{source.path}: config.json ties the head to the embedding, but {copy} differs from {piece.hf}"
                )
