"""Rotary position frequencies as transformers computes them (RoFormer, arXiv:2104.09864; Llama 3.1's scaling)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from fusemega.errors import UserError, choose

_DEFAULT_THETA = 10000.0
_LARGEST = 1e18
_EXTRA_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def rope_parameters(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Rope settings in one form, from `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before).

    As transformers does, `rope_scaling` wins over `rope_parameters`, a `rope_theta` inside them over the one
    beside them, and `type` is an old name of `rope_type`.

    Returns:
        rope_type, rope_theta, and the type's own keys; llama3 also has original_max_position_embeddings.

    Raises:
        UserError: an unsupported type, an unknown or missing key, a value that is not a positive number.
    """
    key = "rope_scaling" if hf_config.get("rope_scaling") else "rope_parameters"
    given = hf_config.get(key) or {}
    if not isinstance(given, Mapping):
        raise UserError(f"config.json: {key} = {given!r}, expected a mapping")
    given = dict(given)
    old_name = given.pop("type", None)
    rope_type = given.pop("rope_type", old_name) or "default"
    choose(f"config.json: {key}.rope_type", str(rope_type), _EXTRA_KEYS)
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"config.json: {key}.partial_rotary_factor other than 1.0 is not supported")
    theta = given.pop("rope_theta", None)
    theta = hf_config.get("rope_theta") if theta is None else theta
    theta = _DEFAULT_THETA if theta is None else theta
    out: dict[str, Any] = {"rope_type": rope_type, "rope_theta": theta}
    for name in _EXTRA_KEYS[rope_type]:
        if given.get(name) is None:
            raise UserError(f"config.json: {key}.{name} is missing (rope_type {rope_type!r} needs it)")
        out[name] = given.pop(name)
    original = given.pop("original_max_position_embeddings", None)
    if rope_type == "llama3":
        longest = hf_config.get("max_position_embeddings", 2048)
        out["original_max_position_embeddings"] = longest if original is None else original
    if given:
        raise UserError(f"config.json: {key}: unknown key(s) {', '.join(map(repr, given))} for rope_type {rope_type!r}")
    for name, value in out.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name != "rope_type" and not (number and 0 < value < _LARGEST):
            raise UserError(f"config.json: {key}.{name} = {value!r}, expected a positive number below {_LARGEST:g}")
    if rope_type == "llama3" and not out["low_freq_factor"] < out["high_freq_factor"]:
        raise UserError(
            f"config.json: {key}.low_freq_factor = {out['low_freq_factor']} is not below high_freq_factor = "
            f"{out['high_freq_factor']}"
        )
    return out


def longest_text(hf_config: Mapping[str, Any]) -> int:
    """The longest text, in positions, for which a model's rope is meant, its scaling included.

    Configurations with llama3's scaling give the scaled length, those with linear scaling the length before it.
    """
    longest = int(hf_config.get("max_position_embeddings") or 2048)
    parameters = rope_parameters(hf_config)
    return math.floor(longest * max(1.0, parameters["factor"])) if parameters["rope_type"] == "linear" else longest


def inverse_frequencies(parameters: Mapping[str, Any], head_dim: int) -> torch.Tensor:
    """Inverse frequencies, float32 [head_dim / 2], of `rope_parameters`' result.

    default: 1 / theta^(2i/d). linear: that over `factor`. llama3: wavelengths beyond
    original_max / low_freq_factor are stretched by `factor`, those below original_max / high_freq_factor are kept,
    and between the two the frequency is interpolated linearly in original_max / wavelength.
    """
    # transformers' operations in the same order: the frequencies must agree bit for bit.
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inv_freq = 1.0 / (parameters["rope_theta"] ** exponents)
    if parameters["rope_type"] == "linear":
        return inv_freq / parameters["factor"]
    if parameters["rope_type"] == "llama3":
        factor, low, high = (parameters[k] for k in ("factor", "low_freq_factor", "high_freq_factor"))
        length = parameters["original_max_position_embeddings"]
        wavelength = 2 * math.pi / inv_freq
        keep = (length / wavelength - low) / (high - low)
        between = (1 - keep) * inv_freq / factor + keep * inv_freq
        stretched = torch.where(wavelength > length / low, inv_freq / factor, inv_freq)
        is_between = (wavelength <= length / low) & (wavelength >= length / high)
        return torch.where(is_between, between, stretched)
    return inv_freq
