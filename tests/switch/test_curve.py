"""Sweeps against a plain loop; choosing within budgets; bands."""

from __future__ import annotations

import numpy as np
import pytest

from fusemega.switch.curve import gain_over_random, random_accuracy, sweep, thresholds_of

RANDOM = np.random.default_rng(3)
SCORES = np.array([0.3, 0.1, 0.3, -0.2])
RATES = np.array([[0.0, 1.0], [0.5, 0.5], [0.25, 0.5], [1.0, 0.75]])
TOKENS = np.array([[10.0, 100.0], [20.0, 200.0], [30.0, 300.0], [40.0, 400.0]])


def test_a_sweep_is_a_plain_loop() -> None:
    curve = sweep(SCORES, RATES, TOKENS, resamples=100)
    assert curve.thresholds_T[0] > 0.3 and curve.thresholds_T[1:].tolist() == [0.3, 0.1, -0.2]
    for place, threshold in enumerate(curve.thresholds_T):
        long = [score >= threshold for score in SCORES]
        assert curve.accuracy_T[place] == np.mean([r[take] for r, take in zip(RATES, map(int, long), strict=True)])
        assert curve.tokens_T[place] == np.mean([t[take] for t, take in zip(TOKENS, map(int, long), strict=True)])
        assert curve.share_T[place] == np.mean(long)
    assert curve.tokens_T[0] == 25 and curve.tokens_T[-1] == 250


def test_budgets() -> None:
    curve = sweep(SCORES, RATES, TOKENS, resamples=100)
    assert curve.best_within(24.9) is None and curve.best_within(25) == 0
    place = curve.best_within(1e9)
    assert place is not None and curve.accuracy_T[place] == curve.accuracy_T.max()
    assert curve.cheapest_with(2.0) is None
    place = curve.cheapest_with(float(RATES[:, 1].mean()))
    assert place is not None and curve.accuracy_T[place] >= RATES[:, 1].mean() and curve.tokens_T[place] < 250


def test_many_scores_are_thinned() -> None:
    scores = RANDOM.normal(size=5000)
    found = thresholds_of(scores)
    assert 150 < len(found) <= 203 and (np.diff(found) < 0).all()
    assert found[0] > scores.max() and found[-1] == scores.min()


def test_bands_hold_the_truth_about_as_often_as_they_say() -> None:
    inside, trials = 0, 200
    for _ in range(trials):
        rates = (RANDOM.random((60, 2)) < 0.4).astype(float)
        curve = sweep(np.zeros(60), rates, np.ones((60, 2)), 300, np.array([1.0]))
        low, high = curve.accuracy_band_T2[0]
        inside += low <= 0.4 <= high
    assert 0.88 < inside / trials < 0.99


def test_choosing_at_random_gains_nothing_and_the_labels_most() -> None:
    rates = np.clip(RANDOM.normal([0.4, 0.6], 0.3, size=(3000, 2)), 0, 1)
    tokens = np.tile([[10.0, 50.0]], (3000, 1))
    found = {
        "random": gain_over_random(sweep(RANDOM.random(3000), rates, tokens, 100), rates, tokens),
        "oracle": gain_over_random(sweep(rates[:, 1] - rates[:, 0], rates, tokens, 100), rates, tokens),
        "reverse": gain_over_random(sweep(rates[:, 0] - rates[:, 1], rates, tokens, 100), rates, tokens),
    }
    assert abs(found["random"]) < 0.01 and found["oracle"] > 0.08 and found["reverse"] < -0.08
    middle = random_accuracy(np.array([30.0]), rates, tokens)[0]
    assert middle == pytest.approx(rates.mean())
