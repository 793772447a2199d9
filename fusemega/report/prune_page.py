"""The page of a search for blocks to remove: perplexity by removals, a map of the removed blocks, and what is saved."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fusemega.report import charts
from fusemega.report.charts import Chart, Curve, short
from fusemega.report.page import PAGE
from fusemega.report.page_template import STYLE

_KINDS = {"mha": "attention", "mlp": "MLP"}
_MAP_STYLE = """
.map td { text-align: center; min-width: 1.6em; border: 1px solid #8884; padding: 2px; font-size: 0.8em }
.map td.gone { background: #d55e00; color: #fff }
"""


@dataclass(frozen=True)
class PruneStep:
    """What is left after a number of removals; the first step is the whole model.

    Attributes:
        kind, layer: the block that this step removes; "" and -1 of the whole model.
        perplexity: on the calibration data; None: not measured.
        parameters, weight_bytes: what is left.
        kv_bytes: of the key/value cache, for each token of a text, in the weights' type.
    """

    kind: str
    layer: int
    perplexity: float | None
    parameters: int
    weight_bytes: int
    kv_bytes: int


def write_prune_page(
    folder: Path, steps: Sequence[PruneStep], layers: int, facts: Mapping[str, str], tokens: int
) -> None:
    """Writes report.html, which needs no other file, and perplexity.png into `folder`.

    Args:
        steps: the whole model first.
        layers: of the whole model.
        facts: name -> value, of the search.
        tokens: predicted tokens of the calibration data.
    """
    points = [(float(n), step.perplexity) for n, step in enumerate(steps) if step.perplexity is not None]
    note = f"on {tokens:,} predicted tokens of calibration data; the x axis counts removed blocks"
    chart = Chart("perplexity", "Perplexity", note, "removed blocks", [Curve("perplexity", 0, points)], short)
    (folder / f"{chart.file}.png").write_bytes(charts.png(chart))
    items = "".join(f"<dt>{html.escape(name)}</dt><dd><code>{html.escape(v)}</code></dd>" for name, v in facts.items())
    title = f"{len(steps) - 1} removed blocks"
    body = [
        f"<h1>{title}</h1>",
        f"<dl>{items}</dl>",
        f'<h2>Perplexity</h2><p class="note">{html.escape(note)}</p><figure>{charts.svg(chart)}</figure>',
        '<h2>Removed blocks</h2><p class="note">the number says at which step a block was removed</p>',
        _map(steps, layers),
        '<h2>What is left</h2><p class="note">the key/value cache is that of one token, in the weights\' type</p>',
        _table(steps),
    ]
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}{_MAP_STYLE}</style><body>{''.join(body)}</body></html>\n"
    )
    (folder / PAGE).write_text(page, encoding="utf-8")


def _map(steps: Sequence[PruneStep], layers: int) -> str:
    """Layers across, the two kinds of blocks down."""
    gone = {(step.kind, step.layer): number for number, step in enumerate(steps)}
    head = "".join(f"<th>{layer}</th>" for layer in range(layers))
    lines = []
    for kind, name in _KINDS.items():
        cells = []
        for layer in range(layers):
            number = gone.get((kind, layer))
            cells.append("<td></td>" if number is None else f'<td class="gone">{number}</td>')
        lines.append(f"<tr><th>{name}</th>{''.join(cells)}</tr>")
    return f'<table class="map"><tr><th>layer</th>{head}</tr>{"".join(lines)}</table>'


def _table(steps: Sequence[PruneStep]) -> str:
    whole = steps[0]
    heads = ["removed", "block", "perplexity", "parameters", "weights", "key/value cache a token"]
    lines = []
    for number, step in enumerate(steps):
        kept = step.kv_bytes / whole.kv_bytes if whole.kv_bytes else 1.0
        cells = [
            str(number),
            f"{step.kind} {step.layer}" if step.kind else "none",
            "–" if step.perplexity is None else f"{step.perplexity:.4f}",
            f"{step.parameters:,} ({step.parameters / whole.parameters:.1%})",
            f"{step.weight_bytes / 1e6:,.1f} MB",
            f"{step.kv_bytes:,} bytes ({kept:.1%})",
        ]
        lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    return f"<table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{''.join(lines)}</table>"
