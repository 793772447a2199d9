"""What a selection has done, in numbers: the content of selection.json."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from fusemega.selection.groups import ResponseTable
from fusemega.selection.protocol import Candidate, Offer, Protocol, SetName, best, margin
from fusemega.selection.run_file import SelectRun

_BINS = 40


@dataclass(frozen=True)
class Selected:
    """A prompt and what became of it.

    Attributes:
        key, domain, dataset: the prompt's.
        offer: what it could give.
        mean_length: of all its responses.
        set: where it is; None: nowhere.
    """

    key: str
    domain: str
    dataset: str
    offer: Offer
    mean_length: float
    set: SetName | None = None

    def put_into(self, name: SetName | None) -> Selected:
        """The same prompt in a set."""
        return replace(self, set=name)

    @property
    def chosen(self) -> tuple[Candidate, ...]:
        """The responses that are written, in the order of the row."""
        found = self.offer.sft if self.set == "sft" else self.offer.preference if self.set == "preference" else ()
        return found or ()

    @property
    def rule(self) -> str:
        """What decided, for a reader."""
        of = f"{self.domain or 'prompts'}: "
        return of + (self.offer.why if self.set is None else self.set)


def summary_of(
    run: SelectRun, protocol: Protocol, table: ResponseTable, selected: Sequence[Selected], files: Mapping[str, int]
) -> dict[str, Any]:
    """The numbers of a selection; JSON-able, and the same for the same responses.

    Args:
        selected: every prompt, in the order of the seed.
        files: name -> rows.
    """
    summary: dict[str, Any] = {
        "protocol": run.protocol.model_dump(mode="json"),
        "seed": run.seed,
        "dedup": None if run.dedup is None else run.dedup.model_dump(mode="json"),
        "decontaminate": None if run.decontaminate is None else run.decontaminate.model_dump(mode="json"),
        "read": {"prompts": len(table.rows), **table.counts},
        "responses": table.sources,
        "counts": counts(selected),
        "removed": removed(selected),
        "margins": margins(selected, protocol),
        "lengths": {"unit": table.unit, "sft": sft_lengths(selected), "pairs": lengths(selected, protocol)},
        "sources": {name: sources(selected, name, protocol) for name in ("sft", "preference")},
        "files": dict(files),
    }
    if protocol.sft_form == "group":
        summary["weights"] = weights(selected, run.protocol.model_dump()["alpha"])
    return summary


def counts(selected: Sequence[Selected]) -> list[dict[str, Any]]:
    """A row for each domain and data set, as in FuseChat-3.0's table, and their total. `total` is what is in a set."""
    rows: dict[tuple[str, str], Counter[str]] = {}
    for each in selected:
        row = rows.setdefault((each.domain, each.dataset), Counter())
        row["prompts"] += 1
        row[each.set or "removed"] += 1
        row["total"] += each.set is not None
    names = ("prompts", "removed", "total", "sft", "preference", "left")
    table: list[dict[str, Any]] = [
        {"domain": domain, "dataset": dataset, **{name: row[name] for name in names}}
        for (domain, dataset), row in sorted(rows.items())
    ]
    total = {name: sum(row[name] for row in table) for name in names}
    return [*table, {"domain": "total", "dataset": "", **total}]


def removed(selected: Sequence[Selected]) -> list[dict[str, Any]]:
    """How many prompts each rule removed, by domain."""
    found = Counter((each.domain, each.offer.why) for each in selected if each.set is None)
    return [{"domain": domain, "rule": rule, "prompts": count} for (domain, rule), count in sorted(found.items())]


def margins(selected: Sequence[Selected], protocol: Protocol) -> dict[str, Any]:
    """Of each domain: how the differences of rewards are distributed, of all sources' best and worst, and of the pairs
    that were written."""
    found: dict[str, Any] = {}
    for domain, members in _by_domain(selected):
        compared = [each for one in members for each in one.offer.margins]
        if not compared:
            continue
        written = [margin(*pair) for pair in _pairs(members, protocol)]
        low, high = min(compared), max(compared)
        edges = np.linspace(low, high if high > low else low + 1e-6, _BINS + 1)
        found[domain] = {
            "least": round(float(edges[0]), 9),
            "most": round(float(edges[-1]), 9),
            "compared": np.histogram(compared, edges)[0].tolist(),
            "written": np.histogram(written, edges)[0].tolist(),
            "compared_quantiles": _quantiles(compared),
            "written_quantiles": _quantiles(written),
        }
    return found


def lengths(selected: Sequence[Selected], protocol: Protocol) -> list[dict[str, Any]]:
    """Of each domain's pairs: is the chosen response the longer one?"""
    rows = []
    for domain, members in _by_domain(selected):
        pairs = _pairs(members, protocol)
        if pairs:
            rows.append(
                {
                    "domain": domain,
                    "pairs": len(pairs),
                    "chosen": round(fmean(chosen.length for chosen, _ in pairs), 2),
                    "rejected": round(fmean(rejected.length for _, rejected in pairs), 2),
                    "chosen_longer": round(fmean(chosen.length > rejected.length for chosen, rejected in pairs), 4),
                    "equal": round(fmean(chosen.length == rejected.length for chosen, rejected in pairs), 4),
                }
            )
    return rows


def sft_lengths(selected: Sequence[Selected]) -> list[dict[str, Any]]:
    """Of each domain's SFT rows: the mean length of the responses, and of all responses to the same prompts."""
    rows = []
    for domain, members in _by_domain(selected):
        chosen = [one for one in members if one.set == "sft"]
        if chosen:
            rows.append(
                {
                    "domain": domain,
                    "rows": len(chosen),
                    "chosen": round(fmean(each.length for one in chosen for each in one.chosen), 2),
                    "all": round(fmean(one.mean_length for one in chosen), 2),
                }
            )
    return rows


def sources(selected: Sequence[Selected], name: SetName, protocol: Protocol) -> dict[str, dict[str, int]]:
    """Domain -> source -> rows of a set in which its response is the best: the one for SFT, or the chosen one."""
    several = (protocol.sft_form if name == "sft" else protocol.preference_form) == "group"
    found: dict[str, dict[str, int]] = {}
    for domain, members in _by_domain(selected):
        won = Counter((best(one.chosen) if several else one.chosen[0]).source for one in members if one.set == name)
        if won:
            found[domain] = dict(sorted(won.items()))
    return found


def weights(selected: Sequence[Selected], alpha: float | str) -> dict[str, Any]:
    """What FuseRL's objectives make of the rewards: softmax(reward / alpha) over the best responses of the sources.

    Args:
        alpha: as in the run file; `auto` is the mean of the standard deviations of the rewards that are weighted.
    """
    found: dict[str, Any] = {}
    for name in ("sft", "preference"):
        groups = [_best_of_each(one.chosen) for one in selected if one.set == name]
        if not groups:
            continue
        rewards = [np.array([each.reward or 0.0 for each in group]) for group in groups]
        used = float(np.mean([reward.std() for reward in rewards])) if alpha == "auto" else float(alpha)
        if used <= 0:
            continue
        total: dict[str, float] = defaultdict(float)
        largest = []
        for group, reward in zip(groups, rewards, strict=True):
            share = np.exp((reward - reward.max()) / used)
            share /= share.sum()
            largest.append(float(share.max()))
            for each, part in zip(group, share, strict=True):
                total[each.source] += float(part)
        found[name] = {
            "alpha": round(used, 6),
            "mean": {source: round(value / len(groups), 4) for source, value in sorted(total.items())},
            "mean_of_largest": round(fmean(largest), 4),
        }
    return found


def _best_of_each(candidates: Iterable[Candidate]) -> list[Candidate]:
    by_source: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        by_source.setdefault(candidate.source, []).append(candidate)
    return [best(each) for each in by_source.values()]


def _pairs(members: Sequence[Selected], protocol: Protocol) -> list[tuple[Candidate, Candidate]]:
    """The two responses that each preference row compares: of a triple the target's; none of FuseRL's groups."""
    if protocol.sft_form == "group":
        return []
    return [(one.chosen[-2], one.chosen[-1]) for one in members if one.set == "preference"]


def _by_domain(selected: Sequence[Selected]) -> list[tuple[str, list[Selected]]]:
    domains: dict[str, list[Selected]] = {}
    for each in selected:
        domains.setdefault(each.domain, []).append(each)
    return sorted(domains.items())


def _quantiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    found = np.quantile(values, (0, 0.1, 0.5, 0.9, 1)).tolist()
    return {name: round(at, 6) for name, at in zip(("min", "p10", "median", "p90", "max"), found, strict=True)}
