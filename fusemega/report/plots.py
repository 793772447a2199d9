"""The picture of a quickstart's models side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import MaxNLocator, PercentFormatter  # noqa: E402

from fusemega.report.charts import COLOURS  # noqa: E402

MODELS = {"target": "#7f7f7f", "control": COLOURS[5], "fused": COLOURS[0], "teacher": COLOURS[2]}


@dataclass(frozen=True)
class Panel:
    """A measure of all models.

    Attributes:
        title: what is measured.
        form: how a value is written.
        lower: whether less is better.
        kinds: kind of text -> name of a model -> its values, one for each seed.
        fixed: a model whose values are fixed by definition: the table has them, and the picture does not.
    """

    title: str
    form: str
    lower: bool
    kinds: Mapping[str, Mapping[str, Sequence[float]]]
    fixed: str | None = None

    @property
    def heading(self) -> str:
        return f"{self.title} ({'lower' if self.lower else 'higher'} is better)"

    def cell(self, kind: str, name: str) -> str:
        """The mean over seeds, and in brackets the distance from lowest to highest; nothing if it was not measured."""
        values = self.kinds[kind].get(name, ())
        if not values:
            return ""
        mean = self.form.format(fmean(values))
        return mean if len(values) == 1 else f"{mean} ({self.form.format(max(values) - min(values))})"

    def better(self, kind: str, *names: str) -> str | None:
        """The name with the better mean; None if all are equal."""
        means = {name: fmean(self.kinds[kind][name]) for name in names}
        if len(set(means.values())) == 1:
            return None
        return (min if self.lower else max)(means, key=means.__getitem__)


def colour_of(name: str) -> str:
    """The colour of a model."""
    return MODELS.get(name, COLOURS[3])


def draw_arms(panels: Sequence[Panel], curves: Mapping[str, Sequence[tuple[float, float]]], title: str) -> plt.Figure:
    """A panel for each measure, and the training curves of the arms.

    In a panel, each kind of text is a line with a dot for each model. Each line has its own scale, which begins where
    its dots lie, because the distances between models matter. A model's small dots are its seeds, and the large one is
    their mean.

    Args:
        panels: the measures.
        curves: arm -> (tokens trained on, cross-entropy on labels) at each update.
        title: title of the figure.
    """
    lines = (len(panels) + 2) // 2
    figure = plt.figure(figsize=(11, 0.6 + 3.2 * lines), layout="constrained")
    figure.suptitle(f"{title} (each line has a scale of its own)")
    grid: Any = figure.subfigures(lines, 2, wspace=0.04, hspace=0.04)
    places = list(grid.flat)
    for place, panel in zip(places, panels, strict=False):
        place.suptitle(panel.heading, x=0.02, ha="left", fontsize="medium")
        rows = [place.add_subplot(len(panel.kinds), 1, row + 1) for row in range(len(panel.kinds))]
        for axes, (kind, values) in zip(rows, panel.kinds.items(), strict=True):
            _dots(axes, kind, {name: seeds for name, seeds in values.items() if name != panel.fixed})
            if "%" in panel.form:
                axes.xaxis.set_major_formatter(PercentFormatter(1))
    place = places[len(panels)]
    place.suptitle("cross-entropy on the labels in training, nats", x=0.02, ha="left", fontsize="medium")
    axes = place.subplots()
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker=".", color=colour_of(name))
    axes.set_xlabel("tokens")
    axes.spines[["top", "right"]].set_visible(False)
    names = {name: None for panel in panels for values in panel.kinds.values() for name in values}
    dots = [Line2D([], [], color=colour_of(name), marker="o", markersize=8, linestyle="") for name in names]
    figure.legend(dots, list(names), loc="outside lower center", ncols=len(names), frameon=False)
    return figure


def _dots(axes: Any, kind: str, values: Mapping[str, Sequence[float]]) -> None:
    for name, seeds in values.items():
        axes.scatter(fmean(seeds), 0, s=64, color=colour_of(name), zorder=3)
        if len(seeds) > 1:
            axes.scatter(seeds, [0] * len(seeds), s=12, color=colour_of(name), alpha=0.6, zorder=2)
    axes.axhline(0, color="#8886", linewidth=1, zorder=1)
    axes.margins(x=0.06)
    axes.set_yticks([0], [kind])
    axes.set_ylim(-1, 1)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.tick_params(labelsize="small", length=2)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "left", "right"]].set_visible(False)
