"""A merge's report as one self-contained HTML page: heat maps over layers, and every tensor in a table."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_LAYER = re.compile(r".*\blayers\.(\d+)\.(.*?)(?:\.weight)?$")
Row = dict[str, Any]
_Value = Callable[[Row], float | None]

_STYLE = """
:root { color-scheme: light; }
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 74rem; padding: 0 1rem; color: #1c2330; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .3rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 0; }
p.note { color: #566; margin: .2rem 0; } code { font-size: .92em; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; } dt { color: #566; } dd { margin: 0; }
.maps { display: flex; flex-wrap: wrap; gap: 1.5rem 2rem; }
figure { margin: 0; width: min-content; } figcaption { margin-bottom: .3rem; font-weight: 600; }
table { border-collapse: collapse; font-size: 12px; } td, th { padding: .15rem .6rem; text-align: right; }
td:first-child, th:first-child { text-align: left; } tr:nth-child(even) td { background: #f5f7fa; }
details summary { cursor: pointer; color: #245; }
"""


def merge_page(report: dict[str, Any]) -> str:
    """The page, from the content of merge_report.json."""
    rows: list[Row] = report["tensors"]
    names = short_names(report["models"])
    measures = []
    for title, explain, values in _measures(rows, names):
        found = (value(row) for row in rows if _LAYER.match(row["tensor"]) for _, value in values)
        numbers = [number for number in found if number is not None]
        scale = (min(numbers, default=0.0), max(numbers, default=1.0))  # one for all models, to compare them by eye
        maps = "".join(_heat_map(name, rows, value, scale) for name, value in values)
        if maps:
            measures.append(f'<h3>{title}</h3><p class="note">{explain}</p><div class="maps">{maps}</div>')
    body = [
        f"<h1>Merge by {html.escape(report['method'])}</h1>",
        _facts(report),
        *(f'<p class="note">{html.escape(note)}</p>' for note in report["notes"]),
        "<h2>Over the layers</h2>",
        "".join(measures) or "<p>This method measures nothing by tensor.</p>",
        "<h2>Every tensor</h2>",
        _table(rows, names),
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Merge by {html.escape(report["method"])}</title>'
        f"<style>{_STYLE}</style><body>{''.join(body)}</body></html>\n"
    )


def _facts(report: dict[str, Any]) -> str:
    facts = [("base", report["base"] or "none")]
    facts += [(f"model {i}", path) for i, path in enumerate(report["models"], 1)]
    facts += [("settings", ", ".join(f"{k}: {v}" for k, v in report["run"]["parameters"].items()) or "defaults")]
    items = "".join(f"<dt>{html.escape(key)}</dt><dd><code>{html.escape(value)}</code></dd>" for key, value in facts)
    return f"<dl>{items}</dl>"


def short_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path in which they differ: `runs/a/hf` and `runs/b/hf` are a and b."""
    parts = [Path(path).parts for path in paths]
    for back in range(1, min(map(len, parts)) + 1):
        names = [part[-back] for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def _measures(rows: list[Row], names: Sequence[str]) -> list[tuple[str, str, list[tuple[str, _Value]]]]:
    """For each measure: (title, explanation, (model, function from a row to the value) for each model). Values that do
    not belong to a single model have the name ""."""
    out: list[tuple[str, str, list[tuple[str, _Value]]]] = []
    for key, title, explain in (
        ("coefficients", "Coefficient", "weight of the model's delta, before signs are erased"),
        ("selected", "Selected share", "share of the elements that the method kept"),
        ("sign_agreement", "Sign agreement", "share of what was kept that has the elected sign"),
        ("delta_rms", "Size of the delta", "root mean square of model minus base"),
        ("within_one_step", "Deltas near rounding", "share of the elements at most one step of the type from the base"),
    ):
        have = [row for row in rows if key in row]
        if not have:
            continue
        if isinstance(have[0][key], list):
            out.append((title, explain, [(name, _item(key, place)) for place, name in enumerate(names)]))
        else:
            out.append((title, explain, [("", _item(key, None))]))
    return out


def _item(key: str, place: int | None) -> _Value:
    return lambda row: None if key not in row else row[key] if place is None else row[key][place]


def _heat_map(name: str, rows: list[Row], value: _Value, scale: tuple[float, float]) -> str:
    """A heat map, of the model `name` if it is given: layers across, the tensors of a layer down. The tensors outside
    the layers are listed below it."""
    cells: dict[tuple[str, int], float] = {}
    outside = []
    for row in rows:
        number = value(row)
        match = _LAYER.match(row["tensor"])
        if number is None:
            continue
        if match:
            cells[match[2], int(match[1])] = number
        else:
            outside.append((row["tensor"], number))
    if not cells:
        return ""
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    layers = 1 + max(layer for _, layer in cells)
    low, high = scale
    size, left, top = 12, 150, 14
    parts = []
    for y, kind in enumerate(kinds):
        parts.append(f'<text x="{left - 6}" y="{top + y * size + 9}" text-anchor="end">{html.escape(kind)}</text>')
        for x in range(layers):
            number = cells.get((kind, x))
            if number is None:
                continue
            shade = 0.5 if high == low else (number - low) / (high - low)
            parts.append(
                f'<rect x="{left + x * size}" y="{top + y * size}" width="{size - 1}" height="{size - 1}" '
                f'fill="{_colour(shade)}"><title>layer {x}, {html.escape(kind)}: {number:.4g}</title></rect>'
            )
    for x in range(0, layers, 5):
        parts.append(f'<text x="{left + x * size}" y="{top - 4}">{x}</text>')
    width, height = left + layers * size + 4, top + len(kinds) * size + 22
    gradient = "".join(
        f'<rect x="{left + 60 + i * 4}" y="{height - 13}" width="4" height="9" fill="{_colour(i / 24)}"/>'
        for i in range(25)
    )
    legend = (
        f'<text x="{left + 54}" y="{height - 5}" text-anchor="end">{low:.3g}</text>{gradient}'
        f'<text x="{left + 166}" y="{height - 5}">{high:.3g}</text>'
    )
    others = ", ".join(f"{html.escape(name)} {number:.3g}" for name, number in outside)
    width = max(width, left + 220)
    return (
        "<figure>"
        + (f"<figcaption>{html.escape(name)}</figcaption>" if name else "")
        + f'<svg width="{width}" height="{height}" font-size="10" font-family="sans-serif" fill="#334">'
        f"{''.join(parts)}{legend}</svg>"
        + (f'<p class="note">outside the layers: {others}</p>' if others else "")
        + "</figure>"
    )


def _colour(shade: float) -> str:
    """0 to 1 as light yellow, green, dark blue: told apart in grey and by the colour-blind."""
    stops = [(253, 243, 190), (122, 196, 137), (41, 121, 142), (56, 32, 97)]
    place = min(max(shade, 0.0), 1.0) * (len(stops) - 1)
    at = min(int(place), len(stops) - 2)
    mixed = [round(a + (b - a) * (place - at)) for a, b in zip(stops[at], stops[at + 1], strict=True)]
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _table(rows: list[Row], names: Sequence[str]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row if key not in ("tensor", "shape")))
    head = ["tensor", "shape"]
    for key in keys:
        sample = next(row[key] for row in rows if key in row)
        head += [f"{key}: {name}" for name in names[: len(sample)]] if isinstance(sample, list) else [key]
    lines = []
    for row in rows:
        values = [html.escape(row["tensor"]), " x ".join(map(str, row["shape"]))]
        for key in keys:
            numbers = row.get(key, [""] * sum(text.startswith(f"{key}: ") for text in head) or "")
            values += [_number(n) for n in numbers] if isinstance(numbers, list) else [_number(numbers)]
        lines.append("<tr>" + "".join(f"<td>{text}</td>" for text in values) + "</tr>")
    heads = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    return f"<details><summary>{len(rows)} tensors</summary><table><tr>{heads}</tr>{''.join(lines)}</table></details>"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)
