"""Curves of several runs: as SVG for a page with any colours, and as PNG.

Long series are thinned to their extremes, so that no spike is lost; noisy ones get a running mean over the faint curve.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)
from matplotlib.ticker import FuncFormatter, MaxNLocator  # noqa: E402

# Okabe and Ito's palette without its yellow, which is lost on white, and a grey; each is readable on white and black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7f7f7f", "#e69f00", "#56b4e9", "#8c6bb1")
_DASHES: tuple[str | tuple[int, tuple[int, ...]], ...] = ("solid", (0, (4, 2)), (0, (1, 1)))
_MOST_POINTS = 1200  # of a curve; longer ones are thinned
_SMOOTH_FROM = 100  # points
_PLAIN: Any = {"text.parse_math": False}  # names of metrics are others' texts, and a "$" in them begins no formula
_INK = "#010203"  # becomes the page's own text colour


@dataclass(frozen=True)
class Curve:
    """One run's values: `points` are (x, y); `index` is the run's place, which decides its colour."""

    name: str
    index: int
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """One quantity of all runs.

    Attributes:
        file: name of its PNG, without suffix.
        title, note: title of the figure, and a note on what the reader should know of the quantity.
        x_label: label of the horizontal axis.
        curves: one for each run that has values.
        form: how values are written at the axis.
        from_zero: whether the axis begins at 0, for quantities whose ratio matters.
        highest: where the axis ends; what lies above leaves the picture. None: it has all values.
    """

    file: str
    title: str
    note: str
    x_label: str
    curves: Sequence[Curve]
    form: Callable[[float], str]
    from_zero: bool = False
    highest: float | None = None

    @property
    def is_smoothed(self) -> bool:
        return any(len(curve.points) >= _SMOOTH_FROM for curve in self.curves)


def colour(index: int) -> str:
    """The colour of the run at a place."""
    return COLOURS[index % len(COLOURS)]


def svg(chart: Chart) -> str:
    """The chart as one <svg> element with the page's text colour; the page has the legend."""
    return as_svg(lambda: _draw(chart, (6.0, 2.9)), chart.title, salt=chart.file)


def as_svg(draw: Callable[[], plt.Figure], label: str, salt: str = "") -> str:
    """A figure as one <svg> element with the page's text colour.

    Args:
        draw: makes the figure; called with the colours set.
        label: text for readers who cannot see it.
        salt: makes its ids differ from those of the page's other figures.
    """
    settings: Any = {**_PLAIN, "svg.fonttype": "none", "svg.hashsalt": salt or label, "text.color": _INK}
    settings |= {"axes.labelcolor": _INK, "axes.edgecolor": _INK, "xtick.color": _INK, "ytick.color": _INK}
    with plt.rc_context(settings), io.StringIO() as text:
        figure = draw()
        # Without a date, and with salted ids: the same figure gives the same text.
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
        drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(_INK, "currentColor")
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    opening = rf'<svg viewBox="\1" role="img" aria-label="{html.escape(label)}">'
    drawn = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', opening, drawn, count=1)
    # Names of groups are the same in every drawing, and nothing asks for them; the other ids are salted.
    return re.sub(r'<g id="[^"]*">', "<g>", drawn)


def png(chart: Chart) -> bytes:
    """The chart on white with its title and a legend."""
    with plt.rc_context(_PLAIN), io.BytesIO() as file:
        figure = _draw(chart, (8.0, 4.2))
        axes = figure.axes[0]
        axes.set_title(chart.title, loc="left")
        figure.legend(loc="outside lower left", frameon=False, fontsize="small", ncols=1 + (len(chart.curves) > 4))
        figure.savefig(file, format="png", dpi=150)
        plt.close(figure)
        return file.getvalue()


def _draw(chart: Chart, size: tuple[float, float]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    for curve in chart.curves:
        dashes = _DASHES[curve.index // len(COLOURS) % len(_DASHES)]
        style: dict[str, Any] = {"color": colour(curve.index), "linestyle": dashes}
        smooth = len(curve.points) >= _SMOOTH_FROM
        name = curve.name.replace("$", r"\$")
        raw = thinned(curve.points)
        if smooth:
            axes.plot(*zip(*raw, strict=True), color=style["color"], alpha=0.28, linewidth=0.8)
            raw = thinned(running_mean(curve.points))
        marker = "." if len(raw) <= 40 else None
        axes.plot(*zip(*raw, strict=True), label=name, linewidth=1.6, marker=marker, **style)
    axes.set_xlabel(chart.x_label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: chart.form(value)))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if chart.from_zero:
        axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
    if chart.highest is not None:
        axes.set_ylim(top=chart.highest)
    return figure


def thinned(points: Sequence[tuple[float, float]], most: int = _MOST_POINTS) -> list[tuple[float, float]]:
    """At most about `most` points: the lowest and the highest of each stretch, in order; a stretch without values stays
    a gap.

    Example:
        >>> thinned([(i, float(i % 10)) for i in range(20)], most=4)
        [(0, 0.0), (9, 9.0), (10, 0.0), (19, 9.0)]
    """
    if len(points) <= most:
        return list(points)
    step = math.ceil(len(points) / (most // 2))
    kept: list[tuple[float, float]] = []
    for begin in range(0, len(points), step):
        part = points[begin : begin + step]
        finite = [point for point in part if math.isfinite(point[1])]
        ends = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])} if finite else {part[0]}
        kept += sorted(ends)
    return kept


def running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Each value averaged with its neighbours, together a fiftieth of the series; fewer at the ends.

    Example:
        >>> running_mean([(1, 2.0), (2, 4.0), (3, 9.0)])
        [(1, 3.0), (2, 5.0), (3, 6.5)]
    """
    half = max(1, len(points) // 100)
    sums, counts = [0.0], [0]
    for _, value in points:
        finite = math.isfinite(value)
        sums.append(sums[-1] + (value if finite else 0.0))
        counts.append(counts[-1] + finite)
    out = []
    for i, (x, value) in enumerate(points):
        low, high = max(0, i - half), min(len(points), i + half + 1)
        known = counts[high] - counts[low]
        out.append((x, (sums[high] - sums[low]) / known if known and math.isfinite(value) else math.nan))
    return out


def short(value: float) -> str:
    """A number in few characters: 1.2k, 3.4M, 5e-06."""
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}" if size >= 1e-3 or not size else f"{value:.2g}"
