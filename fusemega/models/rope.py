"""Rotary position frequencies as transformers computes them (RoFormer, arXiv:2104.09864).

With Llama 3.1's scaling, YaRN (arXiv:2309.00071), dynamic NTK scaling, and LongRoPE (arXiv:2402.13753). Of the last two
a text's frequencies depend on its length.

Shape suffixes: D head size, R its rotated part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fusemega.errors import UserError, choose
from fusemega.runtime.text_rope import TextRope

_DEFAULT_THETA = 10000.0
_LARGEST = 1e18
ORIGINAL = "original_max_position_embeddings"
# Keys of each type: those that it needs, and those that it may have.
_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), (ORIGINAL,)),
    "yarn": (
        ("factor",),
        (ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (("short_factor", "long_factor"), (ORIGINAL, "factor", "attention_factor")),
}
_WITH_ORIGINAL = ("llama3", "yarn", "longrope")
PARTIAL = "partial_rotary_factor"


def rope_parameters(hf_config: Mapping[str, Any], *, partial: bool = False) -> dict[str, Any]:
    """Rope settings in one form, from `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before).

    As transformers does, `rope_scaling` wins over `rope_parameters`, a `rope_theta` inside them over the one
    beside them, and `type` is an old name of `rope_type`.

    Args:
        hf_config: the configuration.
        partial: whether the family may rotate a part of each head.

    Returns:
        rope_type, rope_theta, and the type's own keys that are given; llama3, yarn and longrope also have
        original_max_position_embeddings, dynamic and longrope max_position_embeddings. A `partial_rotary_factor` other
        than 1.

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
    choose(f"config.json: {key}.rope_type", str(rope_type), _KEYS)
    needed, optional = _KEYS[rope_type]
    share = given.pop(PARTIAL, 1.0)
    if share != 1.0 and not partial:
        raise UserError(f"config.json: {key}.{PARTIAL} other than 1.0 is not supported")
    theta = given.pop("rope_theta", None)
    theta = hf_config.get("rope_theta") if theta is None else theta
    theta = _DEFAULT_THETA if theta is None else theta
    out: dict[str, Any] = {"rope_type": rope_type, "rope_theta": theta} | ({} if share == 1.0 else {PARTIAL: share})
    for name in needed:
        if given.get(name) is None:
            raise UserError(f"config.json: {key}.{name} is missing (rope_type {rope_type!r} needs it)")
        out[name] = given.pop(name)
    for name in optional:
        if given.get(name) is not None:
            out[name] = given[name]
        given.pop(name, None)
    longest = "max_position_embeddings"
    if rope_type in ("dynamic", "longrope") or (rope_type in _WITH_ORIGINAL and ORIGINAL not in out):
        if hf_config.get(longest) is None:
            raise UserError(f"config.json: {longest} is missing (rope_type {rope_type!r} needs it)")
        out |= {longest: hf_config[longest]} if rope_type in ("dynamic", "longrope") else {}
        out |= {ORIGINAL: out.get(ORIGINAL, hf_config[longest])} if rope_type in _WITH_ORIGINAL else {}
    given.pop(ORIGINAL, None)  # of the other types, for which it means nothing
    if given:
        raise UserError(f"config.json: {key}: unknown key(s) {', '.join(map(repr, given))} for rope_type {rope_type!r}")
    for name, value in out.items():
        _check_value(f"config.json: {key}.{name}", name, value)
    if rope_type == "llama3" and not out["low_freq_factor"] < out["high_freq_factor"]:
        raise UserError(
            f"config.json: {key}.low_freq_factor = {out['low_freq_factor']} is not below high_freq_factor = "
            f"{out['high_freq_factor']}"
        )
    if rope_type == "longrope" and (out[ORIGINAL] <= 1 or len(out["short_factor"]) != len(out["long_factor"])):
        raise UserError(
            f"config.json: {key}: expected an {ORIGINAL} above 1 (found {out[ORIGINAL]}) and as many long_factor "
            f"({len(out['long_factor'])}) as short_factor ({len(out['short_factor'])})"
        )
    if rope_type in ("yarn", "dynamic", "longrope") and out.get("factor", 1.0) < 1.0:
        raise UserError(f"config.json: {key}.factor = {out['factor']}, expected a number of at least 1")
    if rope_type == "yarn" and theta <= 1:
        raise UserError(f"config.json: {key}.rope_theta = {theta}, expected a number above 1 (rope_type 'yarn')")
    return out


def _check_value(place: str, name: str, value: Any) -> None:
    """Refuses a setting of the wrong type; `rope_type` has been chosen."""
    if name == "rope_type":
        return
    if name == "truncate":
        if not isinstance(value, bool):
            raise UserError(f"{place} = {value!r}, expected true or false")
        return
    listed = name in ("short_factor", "long_factor")
    if listed and not (isinstance(value, list) and 0 < len(value) <= 1 << 15):
        raise UserError(f"{place} is a {type(value).__name__}, expected a list of numbers, one for each pair")
    for found in value if listed else [value]:
        number = isinstance(found, int | float) and not isinstance(found, bool)
        most = 1.0 if name == PARTIAL else _LARGEST
        if not (number and 0 < found < most):
            raise UserError(f"{place} = {found!r}, expected a positive number below {most:g}")


def longest_text(hf_config: Mapping[str, Any]) -> int:
    """The longest text, in positions, for which a model's rope is meant, its scaling included.

    Configurations with llama3's scaling and LongRoPE give the scaled length, those with linear and dynamic scaling the
    length before it. With YaRN either is published.
    """
    longest = int(hf_config.get("max_position_embeddings") or 2048)
    parameters = rope_parameters(hf_config)
    if parameters["rope_type"] in ("linear", "dynamic"):
        return math.floor(longest * max(1.0, parameters["factor"]))
    if parameters["rope_type"] == "yarn":
        return max(longest, math.floor(parameters[ORIGINAL] * parameters["factor"]))
    return longest


def rotary_size(parameters: Mapping[str, Any], head_dim: int) -> int:
    """R: how many of a head's entries are rotated, the first of them.

    Raises:
        UserError: an odd number, or none; not a factor for each pair.
    """
    size = int(head_dim * parameters.get(PARTIAL, 1.0))
    if size % 2 or not size:
        raise UserError(
            f"config.json: {PARTIAL} = {parameters.get(PARTIAL, 1.0)} rotates {size} of a head's {head_dim} entries; "
            "expected an even number above 0"
        )
    for name in ("short_factor", "long_factor"):
        if name in parameters and len(parameters[name]) != size // 2:
            raise UserError(
                f"config.json: {name} has {len(parameters[name])} numbers, expected {size // 2}, one for each pair of "
                "a head's rotated entries"
            )
    return size


def inverse_frequencies(parameters: Mapping[str, Any], head_dim: int) -> torch.Tensor:
    """Inverse frequencies, float32 [R/2], of `rope_parameters`' result; of `text_rope` those of short texts.

    default, dynamic: 1 / theta^(2i/R). linear: that over `factor`. longrope: that over a factor for each i. llama3:
    wavelengths beyond original_max / low_freq_factor are stretched by `factor`, those below
    original_max / high_freq_factor are kept, and between the two the frequency is interpolated linearly in
    original_max / wavelength. yarn: as llama3, but interpolated linearly in i, between the two that turn `beta_fast`
    and `beta_slow` times in original_max positions.
    """
    kind, size = parameters["rope_type"], rotary_size(parameters, head_dim)
    if kind == "yarn":
        return _yarn(parameters, size)
    if kind == "longrope":
        return _stretched(parameters["rope_theta"], parameters["short_factor"], size)
    inv_freq = _plain(parameters["rope_theta"], size)
    if kind == "linear":
        return inv_freq / parameters["factor"]
    if kind == "llama3":
        factor, low, high = (parameters[k] for k in ("factor", "low_freq_factor", "high_freq_factor"))
        length = parameters[ORIGINAL]
        wavelength = 2 * math.pi / inv_freq
        keep = (length / wavelength - low) / (high - low)
        between = (1 - keep) * inv_freq / factor + keep * inv_freq
        stretched = torch.where(wavelength > length / low, inv_freq / factor, inv_freq)
        is_between = (wavelength <= length / low) & (wavelength >= length / high)
        return torch.where(is_between, between, stretched)
    return inv_freq


def text_rope(parameters: Mapping[str, Any], head_dim: int) -> TextRope | None:
    """What rotation has besides `inverse_frequencies`: of yarn, dynamic and longrope; None for the others."""
    kind, size = parameters["rope_type"], rotary_size(parameters, head_dim)
    if kind == "yarn":
        return TextRope(_yarn_scale(parameters), None)
    if kind == "dynamic":
        if size == 2:
            raise UserError("config.json: rope_type 'dynamic' needs heads of more than 2 rotated entries")
        longest, theta, factor = (parameters[k] for k in ("max_position_embeddings", "rope_theta", "factor"))
        return DynamicRope(1.0, longest, theta, factor, size)
    if kind == "longrope":
        factors = tuple(parameters["long_factor"])
        return LongRope(_longrope_scale(parameters), parameters[ORIGINAL], parameters["rope_theta"], factors)
    return None


@dataclass(frozen=True)
class DynamicRope(TextRope):
    """Beyond `same_up_to` = M positions the base grows with the length L: theta (f L / M - (f - 1))^(R / (R - 2)).

    Attributes:
        theta, factor, size: theta, f, R.
    """

    theta: float
    factor: float
    size: int

    def frequencies(self, length: int) -> torch.Tensor:
        """See `TextRope.frequencies`."""
        assert self.same_up_to is not None
        with torch.device("cpu"):
            # transformers has the length as a tensor, and so computes the base in float32.
            growth = self.factor * torch.tensor(length) / self.same_up_to - (self.factor - 1)
            return _plain(self.theta * growth ** (self.size / (self.size - 2)), self.size)


@dataclass(frozen=True)
class LongRope(TextRope):
    """Beyond `same_up_to` positions a text has other frequencies, for all its positions.

    Attributes:
        theta: the base.
        factors: what its powers are multiplied by, for each pair.
    """

    theta: float
    factors: tuple[float, ...]

    def frequencies(self, length: int) -> torch.Tensor:
        """See `TextRope.frequencies`."""
        with torch.device("cpu"):
            return _stretched(self.theta, self.factors, 2 * len(self.factors))


def _exponents(size: int) -> torch.Tensor:
    return torch.arange(0, size, 2, dtype=torch.int64).float() / size


# transformers' operations in the same order: the frequencies must agree bit for bit.
def _plain(theta: float | torch.Tensor, size: int) -> torch.Tensor:
    return 1.0 / (theta ** _exponents(size))


def _stretched(theta: float, factors: Sequence[float], size: int) -> torch.Tensor:
    return 1.0 / (torch.tensor(factors, dtype=torch.float32) * theta ** _exponents(size))


def _yarn(parameters: Mapping[str, Any], size: int) -> torch.Tensor:
    theta, factor, original = (parameters[k] for k in ("rope_theta", "factor", ORIGINAL))

    def pair(turns: float) -> float:
        """The pair, counted from 0, that turns so often in `original` positions."""
        return (size * math.log(original / (turns * 2 * math.pi))) / (2 * math.log(theta))

    low, high = pair(parameters.get("beta_fast") or 32), pair(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high += 0.001 if low == high else 0
    frequencies = theta ** (torch.arange(0, size, 2).float() / size)
    kept = 1 - ((torch.arange(size // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return 1.0 / (factor * frequencies) * (1 - kept) + 1.0 / frequencies * kept


def _yarn_scale(parameters: Mapping[str, Any]) -> float:
    factor, scale, all_dims = parameters["factor"], parameters.get("mscale"), parameters.get("mscale_all_dim")

    def of(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    given = parameters.get("attention_factor")
    if given is not None:
        return float(given)
    return float(of(scale) / of(all_dims)) if scale and all_dims else of(1)


def _longrope_scale(parameters: Mapping[str, Any]) -> float:
    original = parameters[ORIGINAL]
    factor = parameters.get("factor", parameters["max_position_embeddings"] / original)
    given = parameters.get("attention_factor")
    if given is not None:
        return float(given)
    return 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
