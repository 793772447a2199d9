"""Writes a model without the first blocks of an order, in a form that other programs read.

Three forms. `plain` is an ordinary model of fewer layers: the residual stream is a row of blocks, x <- x + f(norm(x)),
so an attention block and the MLP block after it are an ordinary layer, whatever layers they come from. It needs that
the blocks that are left take turns. `nemotron-nas` and `remote-code` keep layers with one block (`models/pruned.py`).
In each, a layer without blocks disappears, the others are renumbered, and all weights are kept bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusemega.errors import UserError, choose
from fusemega.hf.cut_layers import Halves, open_sound, write_layers
from fusemega.hf.folder import HFFolder
from fusemega.hf.hub import resolve
from fusemega.models.architecture import Architecture
from fusemega.models.family import dense_layers, keep_layers
from fusemega.models.pruned import nemotron_nas_config, ordinary_config, remote_code_config
from fusemega.models.registry import architecture_of
from fusemega.prune.order import Order, ResidualBlock, blocks_of, read_order
from fusemega.runtime.parallel import World

RECORD = "pruning.json"
_FORMS = {"nemotron-nas": nemotron_nas_config, "remote-code": remote_code_config}
EXPORTS = ("plain", *_FORMS)


def apply_order(
    source: str | Path,
    order: str | Path | Order,
    out: str | Path,
    world: World,
    *,
    blocks: int | None = None,
    export: str | None = None,
) -> dict[str, Any]:
    """Write the model `source` without the first blocks of an order to the new folder `out`. One process.

    Args:
        source: Hugging Face folder or hub id.
        order: of this model, or the file of one.
        out: absent or empty; appears complete or not at all.
        world: of this process.
        blocks: how many blocks to remove; None: all of the order.
        export: one of `EXPORTS`; None: plain.

    Returns:
        What was removed, where each block comes from, sizes before and after, and notes; also in `pruning.json`.

    Raises:
        UserError: the order belongs to another model or is too short, the form cannot hold the result, the source is
            damaged, or `out` is not empty.
    """
    folder = open_sound(resolve(source))
    order = order if isinstance(order, Order) else read_order(order)
    order.check_model(folder.architecture, folder.content_hash(), str(folder.path))
    removed = order.removed(len(order) if blocks is None else blocks)
    layers, config = planned(folder.architecture, removed, export)
    after = architecture_of(config)
    record: dict[str, Any] = {
        "source": str(source),
        "source_hash": folder.content_hash(),
        "order": order.source,
        "removed": [str(block) for block in removed],
        "export": export or "plain",
        "layers": [list(halves) for halves in layers],
        "parameters": {"before": _parameters(folder.architecture), "after": _parameters(after)},
        "bytes": {"before": _bytes(folder, folder.architecture), "after": _bytes(folder, after)},
        "notes": _notes(after, config, export),
    }

    def finish(made: Path) -> None:
        (made / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    told = write_layers(folder, out, layers, config, world, finish)
    return {"wrote": str(out), **record, "notes": [*record["notes"], *told]}


def planned(
    architecture: Architecture, removed: Sequence[ResidualBlock], export: str | None = None
) -> tuple[list[Halves], dict[str, Any]]:
    """The layers of the model without these blocks, and its configuration.

    Args:
        architecture: the whole model's.
        removed: blocks that it has.
        export: one of `EXPORTS`; None: plain.

    Raises:
        UserError: no blocks are left, or the form cannot hold them: says the first place, and which forms can.
    """
    choose("--export", export or "plain", EXPORTS)
    kept = [block for block in blocks_of(architecture) if block not in set(removed)]
    if not any(block.kind == "mha" for block in kept):
        raise UserError(f"removing {len(removed)} blocks leaves no attention block; remove fewer")
    ordinary = ordinary_config(architecture)
    if export in (None, "plain"):
        problem = unpaired(kept)
        if problem is None:
            layers = [Halves(a.layer, m.layer) for a, m in zip(kept[::2], kept[1::2], strict=True)]
            config = keep_layers(ordinary, [block.layer for block in kept[::2]])
            if "mlp_only_layers" in config:
                config |= dense_layers(ordinary, [block.layer for block in kept[1::2]])
            config.pop("block_configs", None)
            return layers, config
        others = " or ".join(f"--export {form}" for form in _FORMS if _can(form, ordinary, kept))
        raise UserError(
            f"after {len(removed)} removed blocks the model cannot be written as plain, whose layers are an attention "
            f"block and then an MLP block: {problem}; allowed: {others or 'another order'}, or an order found with "
            "constraint: plain"
        )
    layers, config = _with_single_blocks(ordinary, kept)
    return layers, _FORMS[str(export)](architecture_of(config))


def unpaired(kept: Sequence[ResidualBlock]) -> str | None:
    """Why blocks in this order do not make pairs of attention and MLP, at the first place; None: they do."""
    for number, block in enumerate(kept):
        before = kept[number - 1] if number else None
        if block.kind == ("mha", "mlp")[number % 2]:
            continue
        return f"it would begin with {block}" if before is None else f"{block} would follow {before}"
    return f"it would end with {kept[-1]}" if len(kept) % 2 else None


def _with_single_blocks(
    ordinary: Mapping[str, Any], kept: Sequence[ResidualBlock]
) -> tuple[list[Halves], dict[str, Any]]:
    """Layers that keep their blocks, of which one may be missing, and their ordinary configuration."""
    present = set(kept)
    numbers = sorted({block.layer for block in kept})
    layers = [Halves(*(n if ResidualBlock(kind, n) in present else None for kind in ("mha", "mlp"))) for n in numbers]
    config = keep_layers(ordinary, numbers)
    config["block_configs"] = [
        {"attention": {"no_op": halves.attention is None}, "ffn": {"no_op": halves.mlp is None}} for halves in layers
    ]
    return layers, config


def _can(form: str, ordinary: Mapping[str, Any], kept: Sequence[ResidualBlock]) -> bool:
    try:
        _FORMS[form](architecture_of(_with_single_blocks(ordinary, kept)[1]))
    except UserError:
        return False
    return True


def _notes(after: Architecture, config: Mapping[str, Any], export: str | None) -> list[str]:
    if export != "nemotron-nas":
        return []
    notes = []
    if after.layers[0].attention is None:
        notes.append("the first layer has no attention: vLLM breaks on that (its residual is not set there)")
    if any("intermediate_size" in entry["ffn"] for entry in config["block_configs"]):
        notes.append(
            f"feed-forward size {config['intermediate_size']} is no multiple of 256, so block_configs gives it as "
            "intermediate_size: llama.cpp and others that know ffn_mult alone do not read it"
        )
    return notes


def _parameters(architecture: Architecture) -> int:
    return sum(math.prod(shape) for shape in architecture.hf_shapes().values())


def _bytes(folder: HFFolder, architecture: Architecture) -> int:
    """Bytes of weights, in the type of the folder's embedding."""
    name = next(iter(folder.architecture.hf_shapes()))
    return _parameters(architecture) * folder.dtype(name).itemsize
