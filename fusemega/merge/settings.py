"""Settings of a tensor from what a run file says: numbers, gradients over the layers, and patterns of tensor names.

A setting is a value; or a list of numbers, a gradient: linear between equidistant anchors, the first at layer 0 and the
last at the last layer (tensors outside the layers take the first); or a list of `{filter: ..., value: ...}`, of which
the first whose filter fits the tensor's name counts (part of the name, or a shell pattern for the whole name where it
has one of `*?[`; no filter fits all), and whose value is a value or a gradient. This is mergekit's form, and patterns
are ours.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from typing import Any


def fits(pattern: str | None, tensor: str) -> bool:
    """Whether a filter is for this tensor."""
    if pattern is None:
        return True
    if any(character in pattern for character in "*?["):
        return fnmatch.fnmatchcase(tensor, pattern)
    return pattern in tensor


def resolve(setting: Any, tensor: str, depth: float) -> Any:
    """A setting's value for a tensor, or None where none of its filters fits.

    Args:
        setting: of any form above.
        tensor: its name.
        depth: 0 at the first layer, 1 at the last.

    Raises:
        ValueError: it has none of those forms.
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
