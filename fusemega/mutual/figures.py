"""The drawings of a run's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np  # noqa: E402  (after the backend is chosen)
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import MaxNLocator, PercentFormatter  # noqa: E402

from fusemega.report.charts import COLOURS  # noqa: E402

_SIZE = (6.0, 2.9)


def draw_win_rates(candidates: Sequence[Mapping[str, Any]], tau: float) -> plt.Figure:
    """Each checkpoint's win rate over the policy before, with its band, and tau.

    Args:
        candidates: with `checkpoint`, `rate`, `low` and `high`.
        tau: the least rate with which one is kept.
    """
    figure, axes = _axes("iteration of the training", "win rate")
    x = [one["checkpoint"] for one in candidates]
    rates = np.array([one["rate"] for one in candidates])
    errors = np.array([[one["rate"] - one["low"], one["high"] - one["rate"]] for one in candidates]).T.clip(min=0)
    axes.axhline(0.5, color=COLOURS[4], linewidth=0.8, linestyle=(0, (1, 2)))
    axes.axhline(tau, color=COLOURS[1], linewidth=1.2, linestyle=(0, (4, 2)))
    axes.annotate("tau", (0.01, tau), xycoords=("axes fraction", "data"), va="bottom", color=COLOURS[1])
    axes.errorbar(x, rates, errors, color=COLOURS[0], marker="o", markersize=4, linewidth=1.4, capsize=3)
    axes.set_ylim(min(0.3, rates.min() - errors[0].max() - 0.02), max(0.8, tau, rates.max() + errors[1].max()) + 0.04)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if len(x) == 1:
        axes.set_xlim(x[0] - 1, x[0] + 1)
    return figure


def draw_kept(shares: Sequence[Sequence[float]], epsilon: float) -> plt.Figure:
    """The share of the pseudo-pairs that another eps would keep, and eps_t."""
    figure, axes = _axes("eps", "share kept")
    axes.plot(*zip(*shares, strict=True), color=COLOURS[0], linewidth=1.6)
    _line(axes, epsilon, "eps of this step")
    axes.set_ylim(0, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


def draw_differences(histogram: Mapping[str, Any], epsilon: float) -> plt.Figure:
    """The histogram of dr: dark the pairs that are believed."""
    figure, axes = _axes("dr", "pairs")
    edges = np.linspace(histogram["least"], histogram["most"], len(histogram["kept"]) + 1)
    kept, others = np.array(histogram["kept"]), np.array(histogram["others"])
    axes.stairs(kept + others, edges, fill=True, color=COLOURS[6], alpha=0.5)
    axes.stairs(kept, edges, fill=True, color=COLOURS[0])
    if edges[0] <= -epsilon <= edges[-1]:
        _line(axes, -epsilon, "-eps")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    return figure


def draw_drift(lengths: Sequence[float], distances: Sequence[float]) -> plt.Figure:
    """Mean tokens of each policy's responses, and its distance from the first one.

    Args:
        lengths: of pi_0, pi_1 ...
        distances: KL(pi_t || pi_0), nats a token; 0 of pi_0.
    """
    figure, axes = _axes("policy", "tokens of a response")
    axes.plot(range(len(lengths)), lengths, color=COLOURS[0], marker="o", linewidth=1.6, label="tokens (left)")
    axes.set_ylim(0, max(lengths) * 1.15)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    other = axes.twinx()
    other.plot(range(len(distances)), distances, color=COLOURS[1], marker="s", linewidth=1.6, label="KL (right)")
    other.set_ylabel("KL, nats a token")
    other.set_ylim(0, max(*distances, 1e-9) * 1.15)
    other.spines[["top"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize="small")
    return figure


def _axes(x_label: str, y_label: str) -> tuple[plt.Figure, plt.Axes]:
    figure, axes = plt.subplots(figsize=_SIZE, layout="constrained")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _line(axes: plt.Axes, at: float, name: str) -> None:
    axes.axvline(at, color=COLOURS[1], linewidth=1.2)
    axes.annotate(f" {name}", (at, 1), xycoords=("data", "axes fraction"), va="top", color=COLOURS[1])
