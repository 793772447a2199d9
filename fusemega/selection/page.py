"""The page of a selection: counts, margins, lengths, sources, and examples of each rule. It needs no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from fusemega import __version__
from fusemega.report.charts import COLOURS, as_svg
from fusemega.report.page_template import HEAD, STYLE
from fusemega.selection.examples import examples_of
from fusemega.selection.groups import ResponseTable
from fusemega.selection.protocol import Protocol
from fusemega.selection.summary import Selected

_TEMPLATE = (
    HEAD
    + """<title>{{ title }}</title>
<style>
{{ style|safe }}td.number, th.number { text-align: right; } tr.total > * { font-weight: 700; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: .15rem 0 .6rem; }
details { border: 1px solid var(--line); border-radius: 10px; margin: .5rem 0; padding: .3rem .9rem; }
summary { cursor: pointer; font-weight: 600; } details details { border: 0; padding: 0; margin: 0; }
.example { border-top: 1px solid var(--line); padding: .7rem 0 .2rem; }
.role { font-weight: 600; } .wide { margin-top: .6rem; }
</style>
</head>
<body>
{% macro table(heads, rows, total=false) %}
<div class="wide"><table><thead><tr>{% for head in heads %}<th{% if not loop.first %} class="number"{% endif %}>\
{{ head }}</th>{% endfor %}</tr></thead><tbody>
{% for row in rows %}<tr{% if total and loop.last %} class="total"{% endif %}>\
{% for cell in row %}{% if loop.first %}<th>{{ cell }}</th>{% else %}<td class="number">{{ cell }}</td>{% endif %}\
{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endmacro %}
<header><h1>{{ title }}</h1>
<p class="soft">{{ settings }}</p></header>

<h2>Counts</h2>
<p class="soft">{{ read }}</p>
{{ table(count_heads, counts, total=true) }}
{% if removed %}
<h2>What was removed</h2>
{{ table(["domain and rule", "prompts"], removed) }}
{% endif %}
{% if margins %}
<h2>Margins</h2>
<p class="soft">Difference of the rewards of the best and the worst response that were compared, of each source; \
{% if window %}the lines are the window; {% endif %}dark: the pairs that were written.</p>
<div class="charts">{% for domain, drawing in margins %}
<figure><figcaption>{{ domain }}</figcaption>{{ drawing|safe }}</figure>{% endfor %}</div>
{{ table(["domain", "compared: least", "median", "most", "written: least", "median", "most"], quantiles) }}
{% endif %}
{% if pairs or sft %}
<h2>Length of the chosen responses</h2>
<p class="soft">In {{ unit }}. Without a preference for length, the chosen response would be the longer one in half of \
the pairs of different lengths.</p>
{% if pairs %}
{{ table(["pairs", "number", "mean of the chosen", "mean of the rejected", "chosen is longer", "equal"], pairs) }}
{% endif %}
{% if sft %}
{{ table(["SFT", "rows", "mean of the chosen", "mean of all responses to the same prompts"], sft) }}
{% endif %}
{% endif %}
{% if sources %}
<h2>Which source wins where</h2>
{{ table(["source", "responses"] + source_heads, sources) }}
{% endif %}
{% if weights %}
<h2>FuseRL's weights</h2>
<p class="soft">softmax(reward / alpha) over the best response of each source, mean over the prompts. The objective \
computes them again, with its own alpha.</p>
{{ table(["set", "alpha"] + weight_heads + ["mean of the largest"], weights) }}
{% endif %}

<h2>Examples</h2>
{% for rule, shown in examples.items() %}
<details><summary>{{ rule }} ({{ shown|length }} of {{ totals[rule] }})</summary>
{% for example in shown %}
<div class="example">{% if example.facts %}<p class="soft">{{ example.facts }}</p>{% endif %}
<p class="role">prompt</p><div class="text">{{ example.prompt }}</div>
{% for response in example.responses %}
<p><span class="role">{{ response.role }}</span> <span class="soft">{{ response.facts }}</span></p>
<div class="text">{{ response.text }}</div>
{% endfor %}</div>
{% endfor %}</details>
{% endfor %}
<footer>fusemega {{ version }}. The same numbers are in selection.json; removed.jsonl has every removed prompt.</footer>
</body>
</html>
"""
)


def selection_page(
    summary: Mapping[str, Any],
    protocol: Protocol,
    table: ResponseTable,
    selected: Sequence[Selected],
    about: Mapping[str, Mapping[str, Any]],
) -> str:
    """The page's HTML.

    Args:
        summary: as in selection.json.
        about: as `examples_of`.
    """
    totals: dict[str, int] = {}
    for one in selected:
        totals[one.rule] = totals.get(one.rule, 0) + 1
    weights = summary.get("weights", {})
    columns = _count_columns(summary)
    weighed = sorted({source for each in weights.values() for source in each["mean"]})
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE).render(
        version=__version__,
        style=STYLE,
        title=f"Selection by {summary['protocol']['name']}",
        settings=_settings(summary),
        read=_read(summary),
        count_heads=["domain", *(head for _, head in columns)],
        counts=[_numbers([row["domain"], *(row[name] for name, _ in columns)]) for row in summary["counts"]],
        removed=[
            _numbers((f"{row['domain']}: {row['rule']}".lstrip(": "), row["prompts"])) for row in summary["removed"]
        ],
        margins=[
            (domain or "all prompts", _histogram(domain, each, summary)) for domain, each in summary["margins"].items()
        ],
        window=_window(summary),
        quantiles=[_quantiles(domain, each) for domain, each in summary["margins"].items()],
        unit=summary["lengths"]["unit"],
        pairs=[_lengths(row) for row in summary["lengths"]["pairs"]],
        sft=[_numbers(row.values()) for row in summary["lengths"]["sft"]],
        source_heads=_source_heads(summary),
        sources=_sources(summary),
        weight_heads=weighed,
        weights=[
            [
                name,
                each["alpha"],
                *(f"{each['mean'].get(source, 0):.3f}" for source in weighed),
                each["mean_of_largest"],
            ]
            for name, each in weights.items()
        ],
        examples=examples_of(table, protocol, selected, about),
        totals=totals,
    )


_COUNTS = {"dataset": "data set", "sft": "SFT"}


def _count_columns(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, head) of the columns of the table of counts in which there is anything."""
    rows = summary["counts"]
    names = [name for name in rows[0] if name != "domain" and any(row[name] for row in rows)]
    return [(name, _COUNTS.get(name, name)) for name in names]


def _settings(summary: Mapping[str, Any]) -> str:
    settings = {key: value for key, value in summary["protocol"].items() if key != "name" and value not in (None, {})}
    said = [f"{key} {str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()]
    said.append(f"seed {summary['seed']}")
    for key in ("dedup", "decontaminate"):
        if (section := summary[key]) is not None:
            named = (
                [f"against {', '.join(each['name'] for each in section['against'])}"] if "against" in section else []
            )
            said.append(" ".join([key, *named, f"ngram {section['ngram']} threshold {section['threshold']}"]))
    return "; ".join(said)


def _read(summary: Mapping[str, Any]) -> str:
    read = summary["read"]
    line = f"{read['prompts']:,} prompts in {read['rows']:,} rows, {read['responses']:,} responses"
    for name in ("joined_rows", "equal_texts", "of_other_sources", "undecided"):
        line += f", {read[name]:,} {name.replace('_', ' ')}" if read.get(name) else ""
    return line


def _numbers(cells: Any) -> list[str]:
    return [f"{cell:,}" if isinstance(cell, int | float) else str(cell) for cell in cells]


def _lengths(row: Mapping[str, Any]) -> list[str]:
    shares = [f"{row['chosen_longer']:.1%}", f"{row['equal']:.1%}"]
    return _numbers((row["domain"] or "all", row["pairs"], row["chosen"], row["rejected"])) + shares


def _quantiles(domain: str, each: Mapping[str, Any]) -> list[str]:
    cells = [domain or "all"]
    for name in ("compared_quantiles", "written_quantiles"):
        cells += [f"{each[name][at]:.4g}" if each[name] else "–" for at in ("min", "median", "max")]
    return cells


def _columns(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, domain) for name in ("sft", "preference") for domain in summary["sources"][name]]


def _source_heads(summary: Mapping[str, Any]) -> list[str]:
    words = {"sft": "SFT", "preference": "preference"}
    return [f"{words[name]} {domain}".strip() for name, domain in _columns(summary)]


def _sources(summary: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for source, count in summary["responses"].items():
        cells = [source or "(not named)", f"{count:,}"]
        for name, domain in _columns(summary):
            won = summary["sources"][name][domain]
            own = won.get(source, 0)
            cells.append(f"{own:,} ({own / sum(won.values()):.0%})")
        rows.append(cells)
    return rows


def _window(summary: Mapping[str, Any]) -> list[float]:
    found = [summary["protocol"].get(name) for name in ("min_margin", "max_margin")]
    return [value for value in found if value is not None]


def _histogram(domain: str, each: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    def draw() -> plt.Figure:
        figure, axes = plt.subplots(figsize=(6.0, 2.6), layout="constrained")
        edges = np.linspace(each["least"], each["most"], len(each["compared"]) + 1)
        axes.stairs(each["compared"], edges, fill=True, color=COLOURS[6], alpha=0.5)
        axes.stairs(each["written"], edges, fill=True, color=COLOURS[0])
        for value in _window(summary):
            if edges[0] <= value <= edges[-1] and domain in ("instruction", "maths"):
                axes.axvline(value, color=COLOURS[1], linewidth=1)
        axes.set_xlabel("margin")
        axes.set_ylabel("pairs")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        return figure

    return as_svg(draw, f"margins {domain}", salt=f"margins-{domain}")
