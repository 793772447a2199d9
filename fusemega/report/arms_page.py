"""The page of a quickstart: the result, all measures of all models as picture and table, and the models' answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib import pyplot as plt

from fusemega import __version__
from fusemega.report.charts import as_svg
from fusemega.report.page import write_page
from fusemega.report.page_template import HEAD, STYLE
from fusemega.report.plots import Panel, colour_of, draw_arms

PICTURE = "summary.png"
TEMPLATE = (
    HEAD
    + """<title>{{ summary.title }}</title>
<style>
{{ style|safe }}td.best { font-weight: 700; } tbody th { vertical-align: top; }
.seen { font-size: 1.08rem; max-width: 62em; } td.answer { white-space: pre-wrap; }
</style>
</head>
<body>
{% macro model(name) %}<span class="name"><span class="swatch" style="background:{{ colour_of(name) }}"></span>\
{{ name }}</span>{% endmacro %}
<header><h1>{{ summary.title }}</h1></header>
<p class="seen">{{ summary.seen[0]|upper }}{{ summary.seen[1:] }}</p>
<p class="soft">{{ model("target") }} is where both arms began. {{ model("control") }} was trained on the labels \
alone, \
{{ model("fused") }} on the same tokens, in as many updates, with the rows of \
{% for name in summary.teachers %}{{ model(name) }}{% if not loop.last %}, {% endif %}{% endfor %} besides.</p>

<h2>Measures</h2>
<figure>{{ drawing|safe }}</figure>
<div class="wide" style="margin-top:1rem"><table>
<thead><tr><th>measure</th><th>kind of text</th>\
{% for name in names %}<th>{{ model(name) }}</th>{% endfor %}</tr></thead>
<tbody>
{% for panel in panels %}{% for kind in panel.kinds %}{% set best = panel.better(kind, "control", "fused") %}
<tr>{% if loop.first %}<th rowspan="{{ panel.kinds|length }}">{{ panel.title }}<br><span class="soft">\
{{ "lower" if panel.lower else "higher" }} is better</span></th>{% endif %}\
<td>{{ kind }}, {{ "held out" if kind == summary.trained_kind else "never trained on" }}</td>\
{% for name in names %}<td{% if name == best %} class="best"{% endif %}>{{ panel.cell(kind, name) }}</td>\
{% endfor %}</tr>
{% endfor %}{% endfor %}
</tbody></table></div>
<p class="soft">Bold: the better one of control and fused. {% if summary.seeds > 1 %}Means of {{ summary.seeds }} \
seeds; in brackets the distance from lowest to highest.{% else %}One seed.{% endif %} Measured on \
{% for kind, of in summary.kinds.items() %}{{ of.samples }} samples of {{ kind }} ({{ "{:,}".format(of.bytes) }} bytes)\
{% if not loop.last %}, {% endif %}{% endfor %}.</p>

<h2>{{ summary.prompt }}</h2>
<div class="wide"><table><tbody>
{% for name, text in summary.answers.items() %}
<tr><th>{{ model(name) }}</th><td class="answer">{{ text }}</td></tr>
{% endfor %}
</tbody></table></div>
<p class="soft">Answered greedily by transformers, which loaded the exported folders.</p>
<footer>fusemega {{ version }}. The same figures are in summary.json; each run's settings and curves: \
<code>fusemega report FOLDER</code>.</footer>
</body>
</html>
"""
)


def write_arms_page(
    summary: Mapping[str, Any],
    panels: Sequence[Panel],
    curves: Mapping[str, Sequence[tuple[float, float]]],
    folder: Path,
) -> Path:
    """Writes `folder/summary.png` and the folder `folder/report`. Returns its page.

    Args:
        summary: as in summary.json.
        panels: the measures.
        curves: arm -> (tokens trained on, cross-entropy on labels) at each update.
        folder: the quickstart's folder.

    Raises:
        UserError: as `fusemega.report.page.write_report`.
    """

    def draw() -> plt.Figure:
        return draw_arms(panels, curves, summary["title"])

    figure = draw()
    figure.savefig(folder / PICTURE, dpi=150)
    plt.close(figure)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE).render(
        version=__version__,
        style=STYLE,
        summary=summary,
        names=list(summary["measures"]),
        panels=panels,
        colour_of=colour_of,
        drawing=as_svg(draw, summary["title"]),
    )
    return write_page(folder / "report", page, [])
