"""The page of a switcher between two modes: accuracy against tokens, of the switcher and of other choices."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from fusemega.report import charts
from fusemega.report.page import PAGE
from fusemega.report.page_template import STYLE


@dataclass(frozen=True)
class SwitchChoice:
    """A way to choose between the modes.

    Attributes:
        name: of it.
        points: `threshold`, `accuracy`, `tokens`, `accuracy_band`, `long_share` of each point of its curve.
        at_cost: its point at the switcher's cost; None: it has none so cheap.
        gain: mean accuracy above that of choosing at random.
    """

    name: str
    points: Sequence[Mapping[str, Any]]
    at_cost: Mapping[str, Any] | None
    gain: float


def write_switch_page(
    folder: Path,
    choices: Sequence[SwitchChoice],
    short_only: tuple[float, float],
    long_only: tuple[float, float],
    random: tuple[float, float],
    chosen: Mapping[str, Any],
    facts: Mapping[str, str],
) -> None:
    """Writes report.html, which needs no other file, into `folder`.

    Args:
        choices: the switcher first.
        short_only, long_only, random: accuracy and tokens of one mode alone, and of choosing at random.
        chosen: the switcher's point at its threshold.
        facts: name -> value.
    """
    items = "".join(f"<dt>{html.escape(name)}</dt><dd><code>{html.escape(v)}</code></dd>" for name, v in facts.items())
    note = (
        "mean tokens of a response against the share of right ones; each curve is all thresholds of one choice, the "
        "band "
        "95 % of resamples of the prompts; the straight line is choosing at random"
    )
    drawn = charts.as_svg(lambda: _draw(choices, short_only, long_only, chosen), "accuracy against tokens")
    points = choices[0].points
    body = [
        "<h1>Short or long reasoning</h1>",
        f"<dl>{items}</dl>",
        f'<h2>Accuracy against tokens</h2><p class="note">{html.escape(note)}</p><figure>{drawn}</figure>',
        '<h2>At the switcher\'s cost</h2><p class="note">each choice at its point that costs at most as much</p>',
        _table(choices, short_only, long_only, random, chosen),
        "<h2>The switcher's thresholds</h2>",
        _thresholds(points[:: max(1, len(points) // 25)]),
    ]
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Short or long reasoning</title>'
        f"<style>{STYLE}</style><body>{''.join(body)}</body></html>\n"
    )
    (folder / PAGE).write_text(page, encoding="utf-8")


def _draw(
    choices: Sequence[SwitchChoice],
    short_only: tuple[float, float],
    long_only: tuple[float, float],
    chosen: Mapping[str, Any],
) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(8.0, 4.4), layout="constrained")
    ends = sorted([short_only[::-1], long_only[::-1]])
    axes.plot(*zip(*ends, strict=True), color="#7f7f7f", linestyle="dotted", linewidth=1.2, label="random")
    for place, choice in enumerate(choices):
        points = sorted((p["tokens"], p["accuracy"], *p["accuracy_band"]) for p in choice.points)
        tokens, accuracy, low, high = zip(*points, strict=True)
        axes.plot(tokens, accuracy, color=charts.colour(place), linewidth=1.6, label=choice.name)
        if not place:
            axes.fill_between(tokens, low, high, color=charts.colour(0), alpha=0.18, linewidth=0)
    axes.plot([chosen["tokens"]], [chosen["accuracy"]], "o", color=charts.colour(0), label="threshold")
    axes.set_xlabel("mean tokens of a response")
    axes.set_ylabel("accuracy")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    return figure


def _table(
    choices: Sequence[SwitchChoice],
    short_only: tuple[float, float],
    long_only: tuple[float, float],
    random: tuple[float, float],
    chosen: Mapping[str, Any],
) -> str:
    lines = [
        ["short only", f"{short_only[0]:.4f}", "", f"{short_only[1]:,.1f}", ""],
        ["long only", f"{long_only[0]:.4f}", "", f"{long_only[1]:,.1f}", ""],
        ["random", f"{random[0]:.4f}", "", f"{random[1]:,.1f}", ""],
    ]
    for place, choice in enumerate(choices):
        point = chosen if not place else choice.at_cost
        if point is None:
            lines.append([choice.name, "not so cheap", "", "", f"{choice.gain:+.4f}"])
            continue
        band = "{:.4f} to {:.4f}".format(*point["accuracy_band"])
        lines.append([choice.name, f"{point['accuracy']:.4f}", band, f"{point['tokens']:,.1f}", f"{choice.gain:+.4f}"])
    return _rows(["choice", "accuracy", "95 %", "tokens", "gain over random, mean over budgets"], lines)


def _thresholds(points: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        [f"{p['threshold']:.4f}", f"{p['long_share']:.0%}", f"{p['accuracy']:.4f}", f"{p['tokens']:,.1f}"]
        for p in points
    ]
    return _rows(["threshold", "long", "accuracy", "tokens"], lines)


def _rows(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<table><tr>{''.join(f'<th>{html.escape(head)}</th>' for head in heads)}</tr>{body}</table>"
