"""What has become of a run of Mutual-Taught: summary.json, the page, and lines for the terminal.

Everything is read from what the stages have written, so a run that has stopped has the same page up to there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from fusemega.files.json_files import read_json
from fusemega.files.output import write_durably
from fusemega.mutual.page import write_mutual_page
from fusemega.mutual.pseudo_pairs import kept_share
from fusemega.mutual.win_rate import WinRate, choose
from fusemega.pipeline.run import Outcome
from fusemega.recipes.mutual_policy import rows_of
from fusemega.recipes.mutual_settings import MutualTaughtRecipe

_BINS, _SHARES = 40, 41
_EXAMPLES = 6  # of each kind


def summarize(recipe: MutualTaughtRecipe, policies: Sequence[str], outcome: Outcome) -> list[str]:
    """Writes summary.json and the folder `report`. Returns lines for the terminal.

    Args:
        recipe: the settings.
        policies: pi_0, pi_1 ...: folders.
        outcome: what became of the stages.
    """
    folder, finished = Path(recipe.output_dir), outcome.results
    iterations, examples, last = [], {}, 0
    for t in range(1, recipe.iterations + 1):
        if f"compare-{t}" not in finished:
            break
        one: dict[str, Any] = {"iteration": t, "pairs": _pairs(folder, t)}
        one |= {"compared": read_json(folder / "compared" / str(t) / "wins.json")}
        for each in one["compared"]["candidates"]:
            counted = WinRate(each["wins"], each["ties"], each["losses"])
            each["low"], each["high"] = counted.band(recipe.resamples)
        choice = choose({c["checkpoint"]: c["rate"] for c in one["compared"]["candidates"]}, recipe.tau)
        one["decision"] = {"checkpoint": choice.checkpoint, "win_rate": choice.win_rate, "tau": choice.tau}
        one["decision"]["kept"] = choice.is_kept
        if f"choose-{t}" in finished:
            last = t
        for other in ("start", "before"):
            if f"eval-drift-{t}-{other}" in finished:
                one[f"kl_from_{other}"] = read_json(folder / f"eval-drift-{t}-{other}.json")["kl"]
        if f"pairs-reward-{t}" in finished:
            rows = rows_of(folder / "sets" / f"reward-{t}" / "pairs.jsonl")
            one["reward"] = {**finished[f"pairs-reward-{t}"], **_histogram(rows)}
            if f"score-held-out-{t}" in finished:
                one["reward"]["held_out_accuracy_after"] = _accuracy(folder / "rewards" / f"held-out-{t}.jsonl")
            examples[t] = _examples(rows)
        iterations.append(one)
    accuracies = {
        str(t): _accuracy(folder / "rewards" / f"pairs-{t}.jsonl")
        for t in range(recipe.reward_steps + 1)
        if f"score-pairs-{t}" in finished
    }
    summary = {
        "result": policies[last],
        "policy": last,
        "stopped": dict(outcome.stopped),
        "settings": {"iterations": recipe.iterations, "tau": recipe.tau, "mix": recipe.mix, "seed": recipe.seed},
        "splits": finished.get("splits"),
        "iterations": iterations,
        "reward_accuracy": accuracies,
    }
    write_durably(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    page = write_mutual_page(summary, examples, folder)
    return [*_lines(summary), f"the result is {policies[last]}; the page is {page}"]


def _pairs(folder: Path, t: int) -> dict[str, Any]:
    """What the selection of an E step says of its pairs."""
    said = read_json(folder / "sets" / f"policy-{t}" / "selection.json")
    lengths = said["lengths"]
    count = sum(row["pairs"] for row in lengths["pairs"])
    return {
        "prompts": said["read"]["prompts"],
        "pairs": said["files"]["preference.jsonl"],
        "removed": {row["rule"]: row["prompts"] for row in said["removed"]},
        "unit": lengths["unit"],
        **{
            key: sum(row[key] * row["pairs"] for row in lengths["pairs"]) / count
            for key in ("chosen", "rejected", "chosen_longer")
        },
    }


def _accuracy(path: Path) -> dict[str, Any]:
    """How often a pair's chosen response has the higher reward, of rows that `fusemega score` has written."""
    rewards = [row["rewards"] for row in rows_of(path)]
    return {"accuracy": fmean(chosen > rejected for chosen, rejected in rewards), "pairs": len(rewards)}


def _histogram(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The differences' histogram, and the share of pairs that any eps from 0 to 3 eps_t would keep."""
    found = {str(number): row["difference"] for number, row in enumerate(rows)}
    epsilon = float(np.std([row["reward_old"] for row in rows]))
    low, high = min(found.values()), max(found.values())
    edges = np.linspace(low, high if high > low else low + 1e-6, _BINS + 1)
    bins = {name: np.histogram([r["difference"] for r in rows if r["kept"] == kept], edges)[0].tolist()
            for name, kept in (("kept", True), ("others", False))}  # fmt: skip
    shares = [(at, kept_share(found, at)) for at in np.linspace(0, 3 * epsilon, _SHARES).tolist()]
    return {"histogram": {"least": float(edges[0]), "most": float(edges[-1]), **bins}, "kept_by_epsilon": shares}


def _examples(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Pairs for a reader: believed ones of the largest and of the smallest difference, and dropped ones."""
    kept = sorted((row for row in rows if row["kept"]), key=lambda row: row["difference"])
    dropped = sorted((row for row in rows if not row["kept"] and not row["same_text"]), key=lambda r: r["difference"])
    half = _EXAMPLES // 2
    shown = kept if len(kept) <= _EXAMPLES else [*kept[:half], *kept[-half:]]
    return {"kept": shown, "dropped": dropped[:_EXAMPLES]}


def _lines(summary: dict[str, Any]) -> list[str]:
    lines = []
    for one in summary["iterations"]:
        t, decided, pairs = one["iteration"], one["decision"], one["pairs"]
        what = "kept" if decided["kept"] else f"not kept: below tau {decided['tau']:g}"
        best = f"checkpoint {decided['checkpoint']}, win rate {decided['win_rate']:.4f}, {what}"
        lines.append(f"iteration {t}: {pairs['pairs']} pairs of {pairs['prompts']} prompts; {best}")
        if reward := one.get("reward"):
            trained = f"{reward['pseudo_trained_on']} with {reward['ranked_trained_on']} ranked ones"
            lines.append(
                f"  {reward['kept']} of {reward['pairs']} pseudo-pairs believed (eps {reward['epsilon']:.4g}), "
                f"{reward['kept_negative']} of them with a lower reward; trained on {trained}"
            )
    lines += [
        f"reward model {t}: right in {said['accuracy']:.4f} of {said['pairs']} pairs"
        for t, said in summary["reward_accuracy"].items()
    ]
    return lines
