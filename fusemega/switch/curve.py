"""Accuracy against tokens: what a threshold costs and brings, with bootstrap bands.

A choice is a score for each prompt: the long mode is taken where the score is at least the threshold. Of each prompt
the pass rate and the mean tokens of the mode taken count.

Shape suffixes: N prompts, M modes, T thresholds, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_MOST = 201  # thresholds of a curve
_SEED = 20250519
_TOGETHER = 1 << 24  # numbers of resampled weights in memory


@dataclass(frozen=True)
class SwitchCurve:
    """What each threshold gives, by falling threshold: from no prompt in the long mode to all of them.

    Attributes:
        thresholds_T, accuracy_T, tokens_T, share_T: float64; `share` is of prompts in the long mode.
        accuracy_band_T2, tokens_band_T2: the 2.5 and 97.5 % quantiles over resamples of the prompts.
    """

    thresholds_T: np.ndarray
    accuracy_T: np.ndarray
    tokens_T: np.ndarray
    share_T: np.ndarray
    accuracy_band_T2: np.ndarray
    tokens_band_T2: np.ndarray

    def at(self, place: int) -> dict[str, float | list[float]]:
        """One point (JSON-able)."""
        return {
            "threshold": float(self.thresholds_T[place]),
            "accuracy": float(self.accuracy_T[place]),
            "accuracy_band": self.accuracy_band_T2[place].tolist(),
            "tokens": float(self.tokens_T[place]),
            "tokens_band": self.tokens_band_T2[place].tolist(),
            "long_share": float(self.share_T[place]),
        }

    def points(self) -> list[dict[str, float | list[float]]]:
        """All points."""
        return [self.at(place) for place in range(len(self.thresholds_T))]

    def best_within(self, tokens: float) -> int | None:
        """The place of the highest accuracy for at most so many tokens (of equal ones the fewest tokens); None: no
        threshold costs so little."""
        places = np.flatnonzero(self.tokens_T <= tokens + 1e-9)
        return int(max(places, key=lambda i: (self.accuracy_T[i], -self.tokens_T[i]))) if len(places) else None

    def cheapest_with(self, accuracy: float) -> int | None:
        """The place of the fewest tokens with at least this accuracy (of equal ones the most accurate); None: none."""
        places = np.flatnonzero(self.accuracy_T >= accuracy - 1e-9)
        return int(min(places, key=lambda i: (self.tokens_T[i], -self.accuracy_T[i]))) if len(places) else None


def thresholds_of(scores_N: np.ndarray, most: int = _MOST) -> np.ndarray:
    """Thresholds [T] by fall: above all scores, and at scores, so that each takes in at least one prompt more; of many
    scores, as many as `most` at about equal distances in prompts."""
    values = np.unique(scores_N)[::-1]
    if len(values) > most - 1:
        places = np.unique(np.rint(np.linspace(0, len(scores_N) - 1, most - 1)).astype(int))
        values = np.unique(np.sort(scores_N)[::-1][places])[::-1]
        values = np.unique(np.append(values, scores_N.min()))[::-1]
    return np.append(values[0] + max(1e-6, abs(values[0]) * 1e-6), values)


def sweep(
    scores_N: np.ndarray,
    rates_NM: np.ndarray,
    tokens_NM: np.ndarray,
    resamples: int = 1000,
    thresholds_T: np.ndarray | None = None,
) -> SwitchCurve:
    """The curve of a choice.

    Args:
        scores_N: of the prompts.
        rates_NM, tokens_NM: pass rates and mean tokens of both modes; where the long mode is reached by way of the
            short one, its tokens include those.
        resamples: R.
        thresholds_T: by fall; None: `thresholds_of`.
    """
    thresholds_T = thresholds_of(scores_N) if thresholds_T is None else thresholds_T
    long_TN = scores_N[None, :] >= thresholds_T[:, None]
    rates_TN = np.where(long_TN, rates_NM[:, 1], rates_NM[:, 0])
    tokens_TN = np.where(long_TN, tokens_NM[:, 1], tokens_NM[:, 0])
    accuracy_RT, tokens_RT = _resampled(rates_TN, tokens_TN, resamples)
    quantiles = [0.025, 0.975]
    return SwitchCurve(
        thresholds_T,
        rates_TN.mean(1),
        tokens_TN.mean(1),
        long_TN.mean(1),
        np.quantile(accuracy_RT, quantiles, axis=0).T,
        np.quantile(tokens_RT, quantiles, axis=0).T,
    )


def weights_of(count: int, resamples: int, seed: int = _SEED) -> np.ndarray:
    """[R, N]: how often each prompt is drawn, divided by N; the same for the same N, so that curves are paired."""
    random = np.random.default_rng(seed)
    return random.multinomial(count, np.full(count, 1 / count), size=resamples) / count


def _resampled(rates_TN: np.ndarray, tokens_TN: np.ndarray, resamples: int) -> tuple[np.ndarray, np.ndarray]:
    count = rates_TN.shape[1]
    step = max(1, _TOGETHER // count)
    accuracy, tokens = [], []
    for number, start in enumerate(range(0, resamples, step)):
        weights = weights_of(count, min(step, resamples - start), _SEED + number)
        accuracy.append(weights @ rates_TN.T)
        tokens.append(weights @ tokens_TN.T)
    return np.concatenate(accuracy), np.concatenate(tokens)


def random_accuracy(tokens_T: np.ndarray, rates_NM: np.ndarray, tokens_NM: np.ndarray) -> np.ndarray:
    """The expected accuracy of choosing the long mode at random, as often as costs so many tokens."""
    (short, long), (low, high) = rates_NM.mean(0), tokens_NM.mean(0)
    if high == low:
        return np.full_like(tokens_T, max(short, long))
    return short + (long - short) * np.clip((tokens_T - low) / (high - low), 0, 1)


def gain_over_random(curve: SwitchCurve, rates_NM: np.ndarray, tokens_NM: np.ndarray, budgets: int = 200) -> float:
    """The mean, over token budgets from all short to all long, of how much more accurate the lowest threshold within
    the budget is than choosing at random at the same cost. Of a choice at random it is 0 in expectation."""
    low, high = sorted(tokens_NM.mean(0))
    grid = np.linspace(low, high, budgets)
    order = np.argsort(curve.tokens_T, kind="stable")
    places = np.searchsorted(curve.tokens_T[order], grid + 1e-9, side="right") - 1
    reached = curve.accuracy_T[order][np.maximum(places, 0)]
    spent = curve.tokens_T[order][np.maximum(places, 0)]
    return float((reached - random_accuracy(spent, rates_NM, tokens_NM)).mean())
