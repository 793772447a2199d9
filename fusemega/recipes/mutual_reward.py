"""The M step's own stage: pseudo-pairs, those that are believed, and the set that the reward model is trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fusemega.errors import UserError
from fusemega.files.output import write_durably
from fusemega.mutual.mixing import mixed_counts, sampled_down
from fusemega.mutual.pseudo_pairs import PseudoPairs, pseudo_pairs
from fusemega.pipeline.functions import stage_function
from fusemega.recipes.mutual_policy import rows_of
from fusemega.sampling.prompts import prompt_key
from fusemega.selection.protocol import place_in_order

Row = dict[str, Any]


@stage_function
def make_reward_set(
    rewarded: str,
    new: str,
    old: str,
    ranked: Sequence[str],
    mix: float | None,
    held_out: float,
    seed: int,
    pairs: str,
    train: str,
    held: str | None,
) -> dict[str, Any]:
    """Writes all pseudo-pairs, and the set to train on: those that are believed, mixed with earlier ranked pairs.

    Two equal responses are no pair; their rewards count for eps all the same.

    Args:
        rewarded: rows of prompts with one response of each policy and its reward by r_{t-1}.
        new, old: sources of the responses.
        ranked: preference sets of the E steps so far.
        mix: see `mixed_counts`.
        held_out: share of the believed pairs that is not trained on.
        seed: decides which are held out and which are taken, and the order of the rows.
        pairs: JSONL to write: all pseudo-pairs with their differences.
        train: JSONL to write.
        held: likewise, of what is held out; None with `held_out` 0.

    Raises:
        UserError: no pair is believed, or too few to hold one out.
    """
    rows = {prompt_key(row["prompt"]): row for row in rows_of(rewarded)}
    said = {key: _by_source(row) for key, row in rows.items()}
    # The rewards' means over equal texts would differ in nothing: r is a function of the text.
    rewards = {source: {k: of[source]["reward"] for k, of in said.items() if source in of} for source in (new, old)}
    both = [key for key, of in said.items() if new in of and old in of]
    if not both:
        raise UserError(f"{rewarded}: no prompt has a response of both {new} and {old}")
    found = pseudo_pairs(rewards[new], rewards[old])
    same = {key for key in both if said[key][new]["text"] == said[key][old]["text"]}
    believed = [key for key in found.kept if key not in same]
    _write(
        Path(pairs), [_pseudo_row(rows[k], said[k][new], said[k][old], found, k in believed, k in same) for k in both]
    )
    least = 2 if held_out else 1
    if len(believed) < least:
        raise UserError(
            f"{rewarded}: {len(believed)} of {len(both)} pseudo-pairs are believed (eps {found.epsilon:.4g}; "
            f"{len(same)} have two equal responses), and {least} or more are needed"
        )
    count = min(max(1, round(held_out * len(believed))), len(believed) - 1) if held_out else 0
    ordered = sampled_down(believed, len(believed), seed)
    kept_out, left = ordered[:count], ordered[count:]
    of_pseudo = {k: _pair(rows[k]["prompt"], said[k][new]["text"], said[k][old]["text"]) for k in ordered}
    of_ranked = {prompt_key(row["prompt"]): row for path in ranked for row in rows_of(path)}
    counts = mixed_counts(len(left), len(of_ranked), mix)
    taken = {k: of_pseudo[k] for k in sampled_down(left, counts[0], seed)}
    for key in sampled_down(of_ranked, counts[1], seed):
        row = of_ranked[key]
        taken[key] = {name: row[name] for name in ("prompt", "chosen", "rejected")}
    _write(Path(train), [taken[key] for key in sorted(taken, key=lambda key: (place_in_order(seed, key), key))])
    if held is not None:
        _write(Path(held), [of_pseudo[key] for key in kept_out])
    differences = [found.differences[key] for key in both]
    return {
        "prompts": len(rows),
        "pairs": len(both),
        "epsilon": found.epsilon,
        "same_text": len(same),
        "kept": len(believed),
        "kept_negative": sum(found.differences[key] < 0 for key in believed),
        "dropped": len(both) - len(same) - len(believed),
        "mean_difference": fmean(differences),
        "held_out": count,
        "held_out_accuracy_before": fmean(found.differences[key] > 0 for key in kept_out) if kept_out else None,
        "pseudo_trained_on": counts[0],
        "ranked_there": len(of_ranked),
        "ranked_trained_on": counts[1],
    }


def _by_source(row: Mapping[str, Any]) -> dict[str, Row]:
    answers = zip(row["responses"], row["rewards"], strict=True)
    return {answer["source"]: {"text": answer["text"], "reward": reward} for answer, reward in answers}


def _pseudo_row(row: Row, new: Row, old: Row, found: PseudoPairs, kept: bool, same: bool) -> Row:
    return {
        "prompt": row["prompt"],
        "new": new["text"],
        "old": old["text"],
        "reward_new": new["reward"],
        "reward_old": old["reward"],
        "difference": found.differences[prompt_key(row["prompt"])],
        "kept": kept,
        "same_text": same,
    }


def _pair(prompt: Any, chosen: str, rejected: str) -> Row:
    turns = {"chosen": chosen, "rejected": rejected}
    return {"prompt": prompt} | {name: [{"role": "assistant", "content": text}] for name, text in turns.items()}


def _write(path: Path, rows: Sequence[Row]) -> None:
    write_durably(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))
