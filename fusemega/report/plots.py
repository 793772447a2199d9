"""Plots of runs, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)

COLOURS = {"target": "#8c8c8c", "control": "#d98c21", "fused": "#1f6fb4", "teacher": "#3a9250"}


def plot_arms(
    bits_per_byte: Mapping[str, float], curves: Mapping[str, Sequence[tuple[float, float]]], title: str, path: Path
) -> None:
    """Held-out bits per byte of each model as bars, beside the training loss on labels of each arm.

    Args:
        bits_per_byte: name -> value, in the order to show.
        curves: arm -> (tokens trained on, cross-entropy on labels) at each update.
        title: of the figure.
        path: PNG to write.
    """
    figure, (bars, lines) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    names = list(bits_per_byte)
    drawn = bars.barh(names, list(bits_per_byte.values()), color=[COLOURS.get(name, "#666666") for name in names])
    bars.bar_label(drawn, fmt="%.3f", padding=3)
    bars.invert_yaxis()
    bars.margins(x=0.15)
    bars.set_xlabel("held-out bits per byte (lower is better)")
    for name, points in curves.items():
        lines.plot(*zip(*points, strict=True), marker=".", color=COLOURS.get(name), label=name)
    lines.set_xlabel("training tokens")
    lines.set_ylabel("cross-entropy on labels, nats a token")
    lines.legend(frameon=False)
    for axes in (bars, lines):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
