"""`block_configs` of config.json: which blocks a model's layers lack.

The key has the form of `model_type: nemotron-nas`, which Megatron's heterogeneous layers read too: a list with an entry
a layer, `{"attention": {"no_op": true}, "ffn": {"no_op": false}}`. Blocks not mentioned are kept. A block may repeat
its size; sizes that differ from layer to layer are refused.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from fusemega.errors import UserError, nearest
from fusemega.models.family import HFConfig
from fusemega.models.parts import Layer

_BLOCKS = {"attention": "attention", "ffn": "mlp"}
_KEYS = {"attention": ("no_op", "n_heads_in_group"), "ffn": ("no_op", "ffn_mult", "intermediate_size")}
_LARGEST = 1e9
_MULTIPLE = 256  # of which `ffn_mult` gives a multiple


def without_left_out(layers: Sequence[Layer], block_configs: Any) -> tuple[Layer, ...]:
    """The layers without the blocks that `block_configs` of config.json leaves out.

    Args:
        layers: the family's layers, with all their blocks.
        block_configs: the key's value; None: it is absent.

    Raises:
        UserError: not such a list; a layer with no block left; a change of a block other than leaving it out.
    """
    if block_configs is None:
        return tuple(layers)
    if not isinstance(block_configs, list) or len(block_configs) != len(layers):
        found = f"{len(block_configs)} entries" if isinstance(block_configs, list) else repr(block_configs)
        raise UserError(f"config.json: block_configs: {found}, expected a list of {len(layers)}, one for each layer")
    out = []
    for number, (layer, entry) in enumerate(zip(layers, block_configs, strict=True)):
        where = f"config.json: block_configs[{number}]"
        blocks = {
            name: _mapping(block, _KEYS[name], f"{where}.{name}")
            for name, block in _mapping(entry, _BLOCKS, where).items()
        }
        left_out = {_BLOCKS[name]: None for name, block in blocks.items() if _no_op(block, f"{where}.{name}")}
        if len(left_out) == len(_BLOCKS):
            raise UserError(f"{where}: leaves out attention and ffn: leave the layer out (num_hidden_layers)")
        out.append(replace(layer, **left_out))
        _check_sizes(out[-1], blocks, where)
    return tuple(out)


def first_sizes(hf_config: HFConfig) -> dict[str, int]:
    """`num_key_value_heads` and `intermediate_size` of the first blocks of `block_configs` that give a size."""
    entries = hf_config.get("block_configs")
    found: dict[str, int] = {}
    for entry in entries if isinstance(entries, list) else []:
        attention, ffn = (entry.get(name) if isinstance(entry, dict) else None for name in _BLOCKS)
        group = attention.get("n_heads_in_group") if isinstance(attention, dict) else None
        heads = hf_config.get("num_attention_heads")
        if type(group) is int and type(heads) is int and 0 < group <= heads:
            found.setdefault("num_key_value_heads", heads // group)
        sizes = ffn if isinstance(ffn, dict) else {}
        mult, size, hidden = sizes.get("ffn_mult"), sizes.get("intermediate_size"), hf_config.get("hidden_size")
        if isinstance(mult, int | float) and type(hidden) is int and 0 < mult < _LARGEST:
            size = _ffn_size(mult, hidden)
        if type(size) is int:
            found.setdefault("intermediate_size", size)
    return found


def block_configs_of(layers: Sequence[Layer]) -> list[dict[str, dict[str, bool]]]:
    """`block_configs` of these layers: whether each block is left out, and nothing else."""
    return [{name: {"no_op": getattr(layer, part) is None} for name, part in _BLOCKS.items()} for layer in layers]


def sized_block_configs(layers: Sequence[Layer]) -> list[dict[str, dict[str, Any]]]:
    """`block_configs` with the sizes of the blocks, as `model_type: nemotron-nas` has it.

    The size of an MLP is its `ffn_mult` if there is one that gives it, which all readers know, else its
    `intermediate_size`, which some know.
    """
    out = []
    for layer in layers:
        attention, mlp = layer.attention, layer.mlp
        group = None if attention is None else attention.heads // attention.groups
        entry: dict[str, dict[str, Any]] = {"attention": {"n_heads_in_group": group, "no_op": attention is None}}
        mult = None if mlp is None else ffn_mult(mlp.ffn, mlp.hidden)
        if mlp is None or mult is not None:
            entry["ffn"] = {"ffn_mult": mult, "no_op": mlp is None}
        else:
            entry["ffn"] = {"intermediate_size": mlp.ffn, "no_op": False}
        out.append({name: {**block, "replace_with_linear": False} for name, block in entry.items()})
    return out


def ffn_mult(ffn: int, hidden: int) -> float | None:
    """The number from which nemotron-nas computes this feed-forward size; None if there is none.

    Example:
        >>> ffn_mult(1536, 576), ffn_mult(100, 576)
        (4.0, None)
    """
    mult = 3 * ffn / (2 * hidden)
    return mult if _ffn_size(mult, hidden) == ffn else None


def _ffn_size(mult: float, hidden: int) -> int:
    """The feed-forward size that nemotron-nas computes: 2/3 of `mult` times the hidden size, rounded up to 256."""
    return -(-int(2 * mult * hidden / 3) // _MULTIPLE) * _MULTIPLE


def _check_sizes(layer: Layer, blocks: dict[str, dict[str, Any]], where: str) -> None:
    """Refuses sizes of blocks other than the model's."""
    attention, mlp = layer.attention, layer.mlp
    group = blocks.get("attention", {}).get("n_heads_in_group")
    if attention is not None and group is not None and group != attention.heads // attention.groups:
        raise UserError(
            f"{where}.attention.n_heads_in_group = {group!r}, and the model's layers have "
            f"{attention.heads // attention.groups}: layers of different sizes are not supported"
        )
    sizes = blocks.get("ffn", {})
    mult, ffn = sizes.get("ffn_mult"), sizes.get("intermediate_size")
    if mlp is None or (mult is None and ffn is None):
        return
    name, found = ("ffn_mult", mult) if mult is not None else ("intermediate_size", ffn)
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < _LARGEST:
        raise UserError(f"{where}.ffn.{name} = {found!r}, expected a positive number")
    size = found if mult is None else _ffn_size(found, mlp.hidden)
    if size != mlp.ffn:
        raise UserError(
            f"{where}.ffn.{name} = {found!r} is a feed-forward size of {size}, and the model's layers have {mlp.ffn}: "
            "layers of different sizes are not supported"
        )


def _no_op(block: dict[str, Any], where: str) -> bool:
    found = block.get("no_op", False)
    if not isinstance(found, bool):
        raise UserError(f"{where}.no_op = {found!r}, expected true or false")
    return found


def _mapping(value: Any, allowed: Collection[str], where: str) -> dict[str, Any]:
    """A mapping reduced to the allowed keys; null counts as absent."""
    if not isinstance(value, dict):
        raise UserError(f"{where} = {value!r}, expected a mapping")
    for key, found in value.items():
        # null and false change nothing, whatever the key.
        if key not in allowed and found not in (None, False):
            hint = nearest(key, allowed)
            raise UserError(f"{where}.{key} = {found!r} is not supported{hint}; allowed: {', '.join(allowed)}")
    return {key: found for key, found in value.items() if key in allowed and found is not None}
