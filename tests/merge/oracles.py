"""Every merge method again, dense, in float64, with plain sorts and loops: what the streamed ones must equal.

Each takes the base and the list of models as float64 arrays of one tensor's shape, and returns the merged array.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Array = np.ndarray


def linear(base: Array, models: Sequence[Array], weights: Sequence[float], normalize: bool = True) -> Array:
    total = sum(w * m for w, m in zip(weights, models, strict=True))
    return total / sum(weights) if normalize else total


def task_arithmetic(
    base: Array, models: Sequence[Array], weights: Sequence[float], normalize: bool = False, scale: float = 1.0
) -> Array:
    delta = sum(w * (m - base) for w, m in zip(weights, models, strict=True))
    return base + scale * delta / (sum(weights) if normalize else 1.0)


def slerp(base: Array, models: Sequence[Array], t: float) -> Array:
    (other,) = models
    a, b = base.ravel(), other.ravel()
    lengths = math.sqrt(a @ a) * math.sqrt(b @ b)
    cosine = a @ b / lengths if lengths else 1.0
    if abs(cosine) > 0.9995:
        return (1 - t) * base + t * other
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle) * base + math.sin(t * angle) / math.sin(angle) * other


def largest(keys: Array, k: int) -> Array:
    """Mask of the k largest, the earlier of equal ones first."""
    order = sorted(range(keys.size), key=lambda i: (-keys.flat[i], i))
    mask = np.zeros(keys.size, bool)
    mask[order[:k]] = True
    return mask.reshape(keys.shape)


def by_sign(
    base: Array, deltas: Sequence[Array], weights: Sequence[float], normalize: bool, scale: float = 1.0
) -> Array:
    """TIES' election and merge, element by element."""
    out = base.copy()
    for i in np.ndindex(base.shape):
        wanted = [w * d[i] for w, d in zip(weights, deltas, strict=True)]
        positive = sum(wanted) >= 0
        agree = [j for j, x in enumerate(wanted) if (x > 0 if positive else x < 0)]
        total = sum(wanted[j] for j in agree)
        divisor = sum(weights[j] for j in agree) if normalize else 1.0
        out[i] += scale * total / (divisor or 1.0)
    return out


def ties(
    base: Array, models: Sequence[Array], weights: Sequence[float], density: Sequence[float], normalize: bool = True
) -> Array:
    deltas = []
    for model, share in zip(models, density, strict=True):
        delta = model - base
        deltas.append(np.where(largest(abs(delta), max(1, int(share * delta.size))), delta, 0.0))
    return by_sign(base, deltas, weights, normalize)


def varm(base: Array, models: Sequence[Array]) -> Array:
    means = [((m - base) ** 2).mean() for m in models]
    weights = [m / sum(means) if sum(means) else 1 / len(models) for m in means]
    return sum(w * m for w, m in zip(weights, models, strict=True))  # type: ignore[return-value]


def varm_parameter(base: Array, models: Sequence[Array]) -> Array:
    out = base.copy()
    for i in np.ndindex(base.shape):
        squares = [(m[i] - base[i]) ** 2 for m in models]
        if sum(squares):
            out[i] = sum(s / sum(squares) * m[i] for s, m in zip(squares, models, strict=True))
    return out


def sce(base: Array, models: Sequence[Array], tau: float, variant: str) -> tuple[Array, list[float]]:
    """The merge and the coefficients of `sce`, `sce_paper` or `sce_mergekit`."""
    count = len(models)
    deltas = [m - base for m in models]
    sums, squares = sum(deltas), sum(d * d for d in deltas)
    # Ranked in float32, which the method's documentation says.
    variance = np.asarray(np.maximum(squares - sums * sums / count, 0.0)).astype(np.float32)
    mask = largest(variance, int(tau * np.count_nonzero(variance)))
    if tau == 1:  # everything, of whatever variance: the authors' get_sce_weight masks below 1.0 alone
        mask = np.ones(base.shape, bool)
    masked = [np.where(mask, d, 0.0) for d in deltas]
    energies = [float((d * d).sum()) for d in masked]
    total = sum(energies)
    uniform = total / base.size < 1e-6 if variant == "sce_mergekit" else total == 0
    eta = [1 / count] * count if uniform else [e / total for e in energies]
    merged_from = deltas if variant == "sce" else masked
    out = base.copy()
    for i in np.ndindex(base.shape):
        values = [d[i] for d in merged_from]
        positive = sum(values) >= 0
        agree = [j for j, v in enumerate(values) if (v > 0 if positive else v < 0)]
        numerator, divisor = sum(eta[j] * values[j] for j in agree), sum(eta[j] for j in agree)
        if variant == "sce":
            numerator /= divisor or 1.0
        elif variant == "sce_mergekit":
            numerator /= max(divisor, 1e-6)
        out[i] += numerator
    return out, eta
