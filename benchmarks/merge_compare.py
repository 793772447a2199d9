"""Two merges of the same models, element by element: where they differ, and whether a tie at a threshold explains it.

SCE and TIES keep the elements with the largest keys (variances over the models; magnitudes of one model's delta). In
bf16 models many keys are exactly equal, and where more of them equal the threshold than are kept, the choice is open:
fusemega keeps the first by position, mergekit whichever its top-k or its unstable sort puts first. Such elements are
ties here: for `sce` those whose variance in fp32 is within `ROUNDING` of the threshold, for `ties` those whose
magnitude, which is exact in fp32, equals the threshold of a model.

The coefficients of SCE are shares of the squares of what is kept, so they move a little with the ties that are. Where
the terms of a sum nearly cancel, even that, or the fp32 rounding of the terms, is many bf16 places of the small rest:
an element that is no tie is counted as equal within one such place, what the coefficients may move it by, and one
rounding of fp32 for every operation on the terms.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

ROUNDING = 32 * 2.0**-24
"""Relative: two ways to compute a variance of up to eight deltas in fp32."""
CHUNK = 1 << 22


def compare(ours: Path, theirs: Path, base: Path, models: list[Path], method: str, setting: float) -> dict[str, Any]:
    """How two merged folders differ.

    Args:
        ours: one.
        theirs: the other.
        base: the models' base.
        models: K folders.
        method: `sce_mergekit` and `ties` have ties.
        setting: their select_topk or density.

    Returns:
        different_share: of the elements.
        tied_share: of the elements that differ, those that are ties.
        steps, steps_off_ties: the largest difference in units of the larger one's last bf16 place, of all elements and
            of those that are no ties.
        unexplained: how many of the latter differ by more than one such unit, what the coefficients explain and what
            fp32 rounds.
        coefficients_move: how far a coefficient of `sce_mergekit` moves from the first ties to those of `torch.topk`,
            which is mergekit's choice.
    """
    opened = [_open(folder) for folder in (ours, theirs, base, *models)]
    elements = different = tied = unexplained = 0
    steps = off_ties = most_moved = 0.0
    for name in sorted(opened[0].keys() & opened[1].keys()):
        a, b, base_n, *models_n = (files[name].get_tensor(name).flatten() for files in opened)
        elements += len(a)
        places = torch.nonzero(a != b).flatten()
        if not len(places):
            continue
        tie_n, moved = torch.zeros(len(a), dtype=torch.bool), 0.0
        if method == "ties":
            tie_n = _magnitude_ties(base_n, models_n, setting)
        elif method == "sce_mergekit":
            tie_n, moved = _variance_ties(base_n, models_n, setting)
            most_moved = max(most_moved, moved)
        at_a, at_b, tie = a[places].float(), b[places].float(), tie_n[places]
        unit = torch.maximum(at_a.abs(), at_b.abs()).clamp_(min=1e-30).log2_().floor_().sub_(7).exp2_()
        apart = (at_a - at_b).abs() / unit
        different += len(places)
        tied += int(tie.sum())
        steps = max(steps, float(apart.max()))
        off_ties = max(off_ties, float(apart[~tie].max()) if not tie.all() else 0.0)
        # To first order: each of K coefficients moves what it multiplies, and the sum that all are divided by.
        largest = torch.stack([(model[places].float() - base_n[places].float()).abs() for model in models_n]).amax(0)
        terms = torch.stack([part[places].float().abs() for part in (base_n, *models_n)]).sum(0)
        explained = unit + 2 * len(models_n) * moved * largest + (len(models_n) + 2) * 2.0**-24 * terms
        unexplained += int(((at_a - at_b).abs() > explained)[~tie].sum())
    found: dict[str, Any] = {"different_share": different / max(elements, 1), "tied_share": tied / max(different, 1)}
    found |= {"steps": steps, "steps_off_ties": off_ties, "unexplained": unexplained}
    return found | ({"coefficients_move": most_moved} if method == "sce_mergekit" else {})


def _open(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        file = safe_open(path, framework="pt")
        found |= dict.fromkeys(file.keys(), file)  # noqa: SIM118
    return found


def _threshold(keys_n: torch.Tensor, count: int) -> float:
    """The `count`-th largest key."""
    return float(np.sort(keys_n.numpy())[-count])


def _magnitude_ties(base_n: torch.Tensor, models_n: list[torch.Tensor], density: float) -> torch.Tensor:
    tie_n = torch.zeros(len(base_n), dtype=torch.bool)
    for model_n in models_n:
        keys_n = (model_n.float() - base_n.float()).abs_()
        tie_n |= keys_n == _threshold(keys_n, max(1, int(density * len(keys_n))))
    return tie_n


def _variance_ties(
    base_n: torch.Tensor, models_n: list[torch.Tensor], select_topk: float
) -> tuple[torch.Tensor, float]:
    """(the ties, how far apart the coefficients of the two choices among them are)."""
    keys_n = torch.cat([torch.var(deltas, dim=0, unbiased=False) for deltas in _deltas(base_n, models_n)])
    count = int(int(torch.count_nonzero(keys_n)) * select_topk)
    if count == 0:
        return torch.zeros(len(base_n), dtype=torch.bool), 0.0
    threshold = _threshold(keys_n, count)
    first_n = keys_n > threshold * (1 + ROUNDING)
    tie_n = (keys_n >= threshold * (1 - ROUNDING)) & ~first_n
    ties = torch.nonzero(tie_n).flatten()
    first_n[ties[: count - int(first_n.sum())]] = True
    ours = _coefficients(base_n, models_n, first_n)
    if float((ours - ours[0]).abs().max()) == 0:  # below mergekit's floor, whatever is chosen
        return tie_n, 0.0
    theirs_n = torch.zeros_like(first_n)
    theirs_n[torch.topk(keys_n, count).indices] = True
    return tie_n, float((ours - _coefficients(base_n, models_n, theirs_n)).abs().max())


def _coefficients(base_n: torch.Tensor, models_n: list[torch.Tensor], mask_n: torch.Tensor) -> torch.Tensor:
    """Of `sce_mergekit`, fp64 [K]."""
    squares = torch.zeros(len(models_n), dtype=torch.float64)
    for deltas, mask in zip(_deltas(base_n, models_n), mask_n.split(CHUNK), strict=True):
        squares += deltas[:, mask].double().square().sum(dim=1)
    below = float(squares.sum()) / len(base_n) < 1e-6
    return torch.full_like(squares, 1 / len(squares)) if below else squares / squares.sum()


def _deltas(base_n: torch.Tensor, models_n: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """[K, n] in fp32, a chunk at a time."""
    for start in range(0, len(base_n), CHUNK):
        part = slice(start, start + CHUNK)
        base = base_n[part].float()
        yield torch.stack([model[part].float() - base for model in models_n])
