"""The page of a run: every decision with its numbers, also where it has stopped, and no text of others as HTML."""

from __future__ import annotations

import html
from typing import Any

from fusemega.mutual.page import mutual_page

COUNTS = {"mean_reward": 0.5, "mean_tokens": 30.0, "empty": 0, "cut": 2}


def candidate(checkpoint: int, rate: float) -> dict[str, Any]:
    found = {"checkpoint": checkpoint, "rate": rate, "low": rate - 0.1, "high": rate + 0.1}
    return {**found, "wins": 6, "ties": 0, "losses": 4, "prompts": 10, **COUNTS}


def iteration(t: int, rates: dict[int, float], kept: bool) -> dict[str, Any]:
    best = max(rates, key=rates.__getitem__)
    pairs = {"prompts": 20, "pairs": 18, "removed": {": all rewards are equal": 2}, "unit": "tokens"}
    return {
        "iteration": t,
        "pairs": {**pairs, "chosen": 25.0, "rejected": 31.5, "chosen_longer": 0.25},
        "compared": {
            "before": {**COUNTS, "mean_tokens": None},
            "candidates": [candidate(*one) for one in rates.items()],
        },
        "decision": {"checkpoint": best, "win_rate": rates[best], "tau": 0.6, "kept": kept},
    }


FIRST = iteration(1, {50: 0.62, 100: 0.7}, True) | {
    "kl_from_start": 0.01,
    "reward": {
        "pairs": 10,
        "epsilon": 0.25,
        "same_text": 1,
        "kept": 7,
        "kept_negative": 2,
        "dropped": 2,
        "held_out": 2,
        "held_out_accuracy_before": 0.5,
        "held_out_accuracy_after": {"accuracy": 1.0, "pairs": 2},
        "pseudo_trained_on": 5,
        "ranked_there": 18,
        "ranked_trained_on": 5,
        "histogram": {"least": -1.0, "most": 2.0, "kept": [0, 3, 4], "others": [3, 0, 0]},
        "kept_by_epsilon": [(0.0, 0.5), (0.25, 0.7), (0.75, 1.0)],
    },
}
EXAMPLE = {
    "prompt": [{"role": "user", "content": "Why <b>?"}],
    "new": "<script>x</script>",
    "old": "y" * 2000,
    "reward_new": 0.1,
    "reward_old": 0.2,
    "difference": -0.1,
}


def summary(*iterations: dict[str, Any], **more: Any) -> dict[str, Any]:
    settings = {"iterations": 2, "tau": 0.6, "mix": None, "seed": 1}
    splits = {"selection": 10, "policy-1": 20, "in no portion": 0}
    whole = {"result": "out/policies/1", "policy": 1, "stopped": {}, "settings": settings, "splits": splits}
    return {**whole, "iterations": list(iterations), "reward_accuracy": {"0": {"accuracy": 0.5, "pairs": 4}}, **more}


def test_every_decision_with_its_numbers() -> None:
    why = "stopped at 2, win rate 0.5500 < tau 0.6"
    said = summary(FIRST, iteration(2, {50: 0.55}, False), stopped={"choose-2": why})
    page = mutual_page(said, {1: {"kept": [EXAMPLE], "dropped": []}})
    text = html.unescape(page)
    for words in (
        f"The result is pi_1, out/policies/1: {why}.",
        "Checkpoint 100 has the best win rate, 0.7000: it is pi_1.",
        "Checkpoint 50 has the best win rate, 0.5500: that is below tau 0.6, so pi_1 stays and the work ends.",
        "18 length-controlled pairs of 20 prompts; 2 without a pair (all rewards are equal)",
        "eps is 0.25: 7 of 10 pseudo-pairs are believed (70.0%), 2 of them with a lower reward than before; 2",
        "r_1 is trained from r_0 on 5 pseudo-pairs and 5 of 18 ranked pairs.",
        "in 50.0% before, and in 100.0% after the training",
        "mix: all",
    ):
        assert words in text, words
    assert "in no portion" not in text
    # Win rates twice, drift, dr and share kept; the best checkpoint's row is marked.
    assert page.count("<svg") == 5 and page.count('<tr class="best">') == 2
    assert "<script>" not in page and "&lt;script&gt;" in page and "Why &lt;b&gt;?" in page
    assert "(1100 more characters)" in page and "NaN" not in page


def test_a_run_that_stops_at_once_has_a_page() -> None:
    why = "stopped at 1, win rate 0.5000 < tau 0.6"
    said = summary(iteration(1, {2: 0.5}, False), result="model", policy=0, stopped={"choose-1": why}, splits=None)
    page = mutual_page(said | {"reward_accuracy": {}}, {})
    assert f"The result is pi_0, model: {why}." in html.unescape(page)
    assert page.count("<svg") == 1 and "The reward models" not in page
