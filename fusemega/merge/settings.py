"""The value of a setting for one tensor: run files allow values, gradients over the layers, and filters by name.

A setting has one of three forms. The first two are mergekit's, and so is the third, except for shell patterns.

* A value.
* A gradient: a list of numbers, linear between equidistant anchors. The first is for layer 0 and for tensors outside
  the layers, the last for the last layer.
* A list of `{filter: ..., value: ...}`, where the first match applies. A filter is a part of the tensor's name, or, if
  it contains one of `*?[`, a shell pattern for the whole name. Without a filter it matches every tensor. The value is a
  value or a gradient.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from typing import Any


def fits(pattern: str | None, tensor: str) -> bool:
    """Whether a filter matches this tensor."""
    if pattern is None:
        return True
    if any(character in pattern for character in "*?["):
        return fnmatch.fnmatchcase(tensor, pattern)
    return pattern in tensor


def resolve(setting: Any, tensor: str, depth: float) -> Any:
    """A setting's value for a tensor, or None if none of its filters matches.

    Args:
        setting: in one of the forms above.
        tensor: its name.
        depth: 0 at the first layer, 1 at the last.

    Raises:
        ValueError: the setting has none of these forms.

    >>> resolve([0.0, 1.0], "model.layers.5.mlp.up_proj.weight", depth=0.5)
    0.5
    >>> resolve([{"filter": "mlp", "value": 0.9}, {"value": 0.1}], "model.layers.0.self_attn.q_proj.weight", depth=0.0)
    0.1
    """
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if setting and all(isinstance(item, dict) for item in setting):
        for item in setting:
            if "value" not in item or item.keys() - {"filter", "value"}:
                raise ValueError(f"a condition has the keys value and filter, found {', '.join(map(str, item))}")
            if fits(item.get("filter"), tensor):
                return resolve(item["value"], tensor, depth)
        return None
    if not setting or not all(isinstance(item, int | float) and not isinstance(item, bool) for item in setting):
        raise ValueError(f"expected a value, a list of numbers or a list of conditions, found {setting!r}")
    place = depth * (len(setting) - 1)
    left = min(int(place), len(setting) - 1)
    right = min(left + 1, len(setting) - 1)
    return (1 - (place - left)) * setting[left] + (place - left) * setting[right]


def filters(setting: Any) -> Iterator[str]:
    """Every filter in a setting."""
    for item in setting if isinstance(setting, list) else [setting]:
        if isinstance(item, dict):
            if item.get("filter") is not None:
                yield str(item["filter"])
            yield from filters(item.get("value"))
