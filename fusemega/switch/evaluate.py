"""`fusemega switch eval`: the switcher beside other choices, on prompts that it has not seen; figures and a page.

OUT/eval/eval.json      every choice with its curve
OUT/eval/report.html    the same, drawn
"""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from fusemega.errors import UserError
from fusemega.files.output import INSIDE, check_writable, publish, scratch
from fusemega.files.owned import check_replaceable, remove_listed, write_list
from fusemega.report.switch_page import SwitchChoice, write_switch_page
from fusemega.runtime.console import say
from fusemega.store import Store
from fusemega.switch.baselines import encoder_scores, perplexity_choice, text_scores
from fusemega.switch.calibrate import scored, test_set
from fusemega.switch.curve import SwitchCurve, gain_over_random, random_accuracy, sweep
from fusemega.switch.labels import Labels, read_labels
from fusemega.switch.run_file import TRAIN, SwitchRun
from fusemega.switch.switcher import Switcher

FOLDER, FILE, _KIND = "eval", "eval.json", "switch-report"


class ChoiceFound(BaseModel):
    """One choice between the modes.

    Attributes:
        at_cost: its point that costs at most as much as the switcher does at its threshold: accuracy, tokens and bands.
            None: it cannot be that cheap.
        gain: mean accuracy over token budgets above that of choosing at random at the same cost.
        share_of_oracle: `gain` by the oracle's; None where that is 0.
        curve: all points.
    """

    model_config = ConfigDict(frozen=True)

    at_cost: dict[str, Any] | None
    gain: float
    share_of_oracle: float | None
    curve: list[dict[str, Any]]


class SwitchEvaluated(BaseModel):
    """What was measured.

    Attributes:
        prompts, measured_on: how many, and which.
        switcher: at its threshold: threshold, accuracy, tokens, bands, share of long.
        tokens_saved, accuracy_lost: the same against the long mode alone, the first as a fraction of its tokens.
        short_only, long_only, random: accuracy and tokens of one mode alone, and of choosing at random at the
            switcher's cost (in expectation).
        choices: name -> what was found, the switcher and the oracle among them.
        weights: of the model, and the hash of the labels.
    """

    model_config = ConfigDict(frozen=True)

    prompts: int
    measured_on: str
    switcher: dict[str, Any]
    tokens_saved: float
    accuracy_lost: float
    short_only: tuple[float, float]
    long_only: tuple[float, float]
    random: tuple[float, float]
    choices: dict[str, ChoiceFound]
    weights: str
    labels: str


def evaluate_switch(run: SwitchRun) -> SwitchEvaluated:
    """Measures, and writes OUT/eval.

    Raises:
        UserError: labels, features or switcher are missing or do not fit each other.
    """
    out = run.out / FOLDER
    check_replaceable(out, _KIND)
    check_writable(out)
    switcher = Switcher.load(run.switcher)
    labels, words = test_set(run, switcher)
    scores_NM = scored(run, switcher, labels)
    gain_N = scores_NM[:, 1] - scores_NM[:, 0]
    rates_NM, tokens_NM, resamples = labels.rates_NM, labels.tokens_NM, run.baselines.resamples
    at = sweep(gain_N, rates_NM, tokens_NM, resamples, np.array([switcher.config.threshold]))
    curves = {"switcher": sweep(gain_N, rates_NM, tokens_NM, resamples)}
    curves |= _others(run, labels, resamples)
    point: dict[str, Any] = at.at(0)
    oracle = gain_over_random(curves["oracle"], rates_NM, tokens_NM)
    accuracy, tokens = rates_NM.mean(0), tokens_NM.mean(0)
    found = SwitchEvaluated(
        prompts=len(labels),
        measured_on=words,
        switcher=point,
        tokens_saved=1 - point["tokens"] / float(tokens[1]) if tokens[1] else 0.0,
        accuracy_lost=float(accuracy[1]) - point["accuracy"],
        short_only=(float(accuracy[0]), float(tokens[0])),
        long_only=(float(accuracy[1]), float(tokens[1])),
        random=(float(random_accuracy(at.tokens_T, rates_NM, tokens_NM)[0]), point["tokens"]),
        choices={name: _found(curve, point["tokens"], rates_NM, tokens_NM, oracle) for name, curve in curves.items()},
        weights=switcher.config.weights,
        labels=labels.digest,
    )
    with scratch(out) as place:
        check_replaceable(out, _KIND)
        made = place / INSIDE
        made.mkdir()
        (made / FILE).write_text(json.dumps(found.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
        choices = [SwitchChoice(name, each.curve, each.at_cost, each.gain) for name, each in found.choices.items()]
        facts = {"prompts": f"{found.prompts} ({words})", "threshold": f"{point['threshold']:.4f}"}
        write_switch_page(made, choices, found.short_only, found.long_only, found.random, point, facts)
        write_list(made, _KIND)
        real = os.path.realpath(out)
        if os.path.isdir(real):
            remove_listed(out)
        publish(made, out)
    say(f"{out / 'report.html'}")
    return found


def _others(run: SwitchRun, labels: Labels, resamples: int) -> dict[str, SwitchCurve]:
    """The curves of the other choices."""
    curves = {}
    train = read_labels(run.labels_file(TRAIN))
    if run.baselines.text:
        curves["text classifier"] = sweep(text_scores(train, labels), labels.rates_NM, labels.tokens_NM, resamples)
    if run.baselines.sentence_encoder is not None:
        scores_N = encoder_scores(run, run.baselines.sentence_encoder, train, labels)
        curves["sentence encoder"] = sweep(scores_N, labels.rates_NM, labels.tokens_NM, resamples)
    if run.baselines.perplexity:
        if run.answers_store.is_dir():
            choice = perplexity_choice(Store.open(run.answers_store), labels)
            curves["perplexity of the short answer"] = sweep(*choice, resamples)
        elif "perplexity" in run.baselines.model_fields_set:
            raise UserError(f"baselines.perplexity: {run.answers_store} is not there; set features.short_answers: true")
        else:
            say("without the baseline of perplexity: features.short_answers is not set")
    curves["oracle"] = sweep(labels.gain_N, labels.rates_NM, labels.tokens_NM, resamples)
    return curves


def _found(
    curve: SwitchCurve, tokens: float, rates_NM: np.ndarray, tokens_NM: np.ndarray, oracle: float
) -> ChoiceFound:
    gain = gain_over_random(curve, rates_NM, tokens_NM)
    within = np.flatnonzero(curve.tokens_T <= tokens + 1e-9)
    # Not the most accurate one: that would reward curves for going up and down.
    place = int(within[np.argmax(curve.tokens_T[within])]) if len(within) else None
    return ChoiceFound(
        at_cost=None if place is None else curve.at(place),
        gain=gain,
        share_of_oracle=gain / oracle if oracle > 0 else None,
        curve=curve.points(),
    )


def table(found: SwitchEvaluated) -> str:
    """The figures for a terminal."""
    rows = [("choice", "accuracy", "95 %", "tokens", "gain over random", "of the oracle's")]

    def row(name: str, accuracy: float, band: Any, tokens: float, choice: ChoiceFound | None) -> None:
        share = None if choice is None else choice.share_of_oracle
        rows.append(
            (
                name,
                f"{accuracy:.4f}",
                "" if band is None else f"{band[0]:.4f} to {band[1]:.4f}",
                f"{tokens:.1f}",
                "" if choice is None else f"{choice.gain:+.4f}",
                "" if share is None else f"{share:.0%}",
            )
        )

    row("short only", *_pair(found.short_only), None)
    row("long only", *_pair(found.long_only), None)
    row("random", *_pair(found.random), None)
    at = found.switcher
    row(
        f"switcher at {at['threshold']:.4f}",
        at["accuracy"],
        at["accuracy_band"],
        at["tokens"],
        found.choices["switcher"],
    )
    for name, choice in found.choices.items():
        if name != "switcher" and choice.at_cost is not None:
            point = choice.at_cost
            row(name, point["accuracy"], point["accuracy_band"], point["tokens"], choice)
    widths = [max(len(each[i]) for each in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(each, widths, strict=True)).rstrip() for each in rows]
    saved = f"{found.tokens_saved:.1%} fewer tokens than long only, accuracy lower by {found.accuracy_lost:.4f}"
    return "\n".join([*lines, f"{saved}; {found.prompts} prompts ({found.measured_on})"])


def _pair(values: tuple[float, float]) -> tuple[float, None, float]:
    return values[0], None, values[1]
