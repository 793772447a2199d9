"""`fusemega switch calibrate`: the threshold for a budget of tokens or a loss of accuracy, from the curve."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from fusemega.errors import UserError
from fusemega.runtime.console import say
from fusemega.switch.curve import SwitchCurve, sweep
from fusemega.switch.features import read_features
from fusemega.switch.labels import Labels, read_labels
from fusemega.switch.run_file import CALIBRATION, TEST, TRAIN, SwitchRun
from fusemega.switch.switcher import Switcher
from fusemega.switch.train import split


class Calibrated(BaseModel):
    """The threshold, and what it gives on the prompts that it was picked on.

    Attributes:
        prompts: that it was picked on.
        picked_on: which they are.
        threshold, accuracy, accuracy_band, tokens, tokens_band, long_share: as in the curve; bands are 95 %.
        short_only, long_only: accuracy and mean tokens of one mode alone.
    """

    model_config = ConfigDict(frozen=True)

    prompts: int
    picked_on: str
    threshold: float
    accuracy: float
    accuracy_band: tuple[float, float]
    tokens: float
    tokens_band: tuple[float, float]
    long_share: float
    short_only: tuple[float, float]
    long_only: tuple[float, float]


def scored(run: SwitchRun, switcher: Switcher, labels: Labels) -> np.ndarray:
    """[N, M], the switcher's scores of labelled prompts.

    Raises:
        UserError: features are missing, or of another model or template.
    """
    features_NH, manifest = read_features(run.features_store, labels.keys, labels.path)
    switcher.check_features(manifest, run.features_store)
    return switcher.scores(features_NH)


def calibration_set(run: SwitchRun, switcher: Switcher) -> tuple[Labels, str]:
    """The prompts to pick the threshold on, and in words which they are.

    Raises:
        UserError: they have no labels; the training labels are not those that the switcher was trained on.
    """
    if CALIBRATION in run.sets:
        return read_labels(run.labels_file(CALIBRATION)), "calibration_prompts"
    labels = read_labels(run.labels_file(TRAIN))
    if switcher.config.training.get("labels") != labels.digest:
        raise UserError(
            f"{labels.path}: not the labels that {switcher.path} was trained on, so its validation prompts are not "
            "known; "
            "run `fusemega switch train` again, or give calibration_prompts"
        )
    held = split(labels, float(switcher.config.training["settings"]["validation"]))[1]
    return labels.take(held), "the validation share of prompts"


def test_set(run: SwitchRun, switcher: Switcher) -> tuple[Labels, str]:
    """The prompts for `eval`, and in words which they are."""
    if TEST in run.sets:
        return read_labels(run.labels_file(TEST)), "test_prompts"
    labels, words = calibration_set(run, switcher)
    return labels, f"{words}, on which the threshold was picked too"


def calibrate(
    run: SwitchRun,
    token_budget: float | None = None,
    max_accuracy_loss: float | None = None,
    threshold: float | None = None,
) -> Calibrated:
    """Picks the threshold, and writes it into OUT/switcher.

    Args:
        token_budget: mean tokens of a response; the most accurate threshold within it is taken.
        max_accuracy_loss: against the long mode alone, as a fraction; the cheapest threshold within it is taken.
        threshold: this one is taken. Exactly one of the three is given.

    Raises:
        UserError: nothing meets it (the nearest is told); labels, features or switcher are missing or do not fit.
    """
    if [token_budget, max_accuracy_loss, threshold].count(None) != 2:
        raise UserError("give one of --token-budget, --max-accuracy-loss and --threshold")
    if threshold is not None and not -1 <= threshold <= 1:
        raise UserError(f"--threshold: {threshold:g}; allowed: -1 (always long) to 1 (always short)")
    switcher = Switcher.load(run.switcher)
    labels, words = calibration_set(run, switcher)
    scores_NM = scored(run, switcher, labels)
    gain_N = scores_NM[:, 1] - scores_NM[:, 0]
    resamples = run.baselines.resamples
    curve = sweep(gain_N, labels.rates_NM, labels.tokens_NM, resamples)
    if threshold is not None:
        curve = sweep(gain_N, labels.rates_NM, labels.tokens_NM, resamples, np.array([threshold]))
        place, how = 0, {"threshold": threshold}
    elif token_budget is not None:
        place, how = _within(curve, token_budget), {"token_budget": token_budget}
    else:
        assert max_accuracy_loss is not None
        place, how = _losing(curve, labels, max_accuracy_loss), {"max_accuracy_loss": max_accuracy_loss}
    point: dict[str, Any] = curve.at(place)
    if threshold is None:
        point["threshold"] = _between(point["threshold"], gain_N)
    rates, tokens = labels.rates_NM.mean(0), labels.tokens_NM.mean(0)
    found = Calibrated(
        prompts=len(labels),
        picked_on=words,
        **point,
        short_only=(float(rates[0]), float(tokens[0])),
        long_only=(float(rates[1]), float(tokens[1])),
    )
    switcher.with_threshold(found.threshold, {**how, **found.model_dump(mode="json")}).write(run.switcher)
    say(
        f"threshold {found.threshold:.4f}: accuracy {found.accuracy:.4f} ({found.accuracy_band[0]:.4f} to "
        f"{found.accuracy_band[1]:.4f}) with {found.tokens:.1f} tokens, long for {found.long_share:.0%} of "
        f"{len(labels)} "
        f"prompts ({words}); long only {rates[1]:.4f} with {tokens[1]:.1f}, short only {rates[0]:.4f} with "
        f"{tokens[0]:.1f}"
    )
    return found


def _between(threshold: float, gain_N: np.ndarray) -> float:
    """A threshold with the same choices that is no prompt's own score, which rounds otherwise on another machine."""
    below = gain_N[gain_N < threshold]
    lower = float(below.max()) if len(below) else threshold - 0.01
    return min(1.0, max(-1.0, (threshold + lower) / 2))


def _within(curve: SwitchCurve, budget: float) -> int:
    place = curve.best_within(budget)
    if place is None:
        nearest = curve.at(int(np.argmin(curve.tokens_T)))
        raise UserError(
            f"--token-budget: no threshold costs {budget:g} tokens or fewer; the nearest is "
            f"{nearest['threshold']:.4f}, with "
            f"{nearest['tokens']:.1f} tokens and an accuracy of {nearest['accuracy']:.4f}"
        )
    return place


def _losing(curve: SwitchCurve, labels: Labels, loss: float) -> int:
    wanted = float(labels.rates_NM[:, 1].mean()) - loss
    place = curve.cheapest_with(wanted)
    if place is None:
        nearest = curve.at(int(np.argmax(curve.accuracy_T)))
        raise UserError(
            f"--max-accuracy-loss: no threshold is as accurate as {wanted:.4f} (long only, less {loss:g}); the "
            "nearest is "
            f"{nearest['threshold']:.4f}, with {nearest['accuracy']:.4f} and {nearest['tokens']:.1f} tokens"
        )
    return place
