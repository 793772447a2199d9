"""The style of a page, and the HTML of a report on runs, as jinja2 templates.

A page loads no script, font, image or style from outside.
"""

from __future__ import annotations

STYLE = """\
:root { --ink: #1c2024; --soft: #60646c; --page: #ffffff; --panel: #f6f7f9; --line: #e0e3e8; --mark: #fff3c9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9ba1a9; --page: #15181c; --panel: #1d2126; --line: #30363d; --mark: #4a3f12; }
}
@media print {
  :root { --ink: #000; --soft: #555; --page: #fff; --panel: #fff; --line: #ccc; --mark: #fff3c9; }
  body { max-width: none !important; padding: 0 !important; font-size: 9pt !important;
         -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  .wide { overflow: visible !important; }
  figure, tr { break-inside: avoid; }
  .settings td, .settings thead th { min-width: 0; }
  .charts { grid-template-columns: 1fr 1fr !important; }
  .legend { position: static; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1320px; padding: 2.2rem 1.6rem 4rem; background: var(--page); color: var(--ink);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .7rem; }
p { margin: .3rem 0; } .soft { color: var(--soft); }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.3rem; margin: 0; padding: .6rem 0; list-style: none;
          position: sticky; top: 0; background: var(--page); border-bottom: 1px solid var(--line); z-index: 2; }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 3px; margin-right: .45em; flex: none; }
.name { white-space: nowrap; max-width: 22em; overflow: hidden; text-overflow: ellipsis; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .9rem 1rem .5rem; background: var(--panel); border: 1px solid var(--line);
         border-radius: 10px; min-width: 0; }
figcaption { font-weight: 600; } figcaption span { font-weight: 400; color: var(--soft); margin-left: .5em; }
figure svg { display: block; width: 100%; height: auto; margin-top: .4rem; }
figure svg text { font-family: inherit !important; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: .92em; }
th, td { text-align: left; padding: .42rem .8rem; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child > * { border-bottom: 0; }
thead th { background: var(--panel); font-weight: 600; }
tbody th { font-weight: 500; background: var(--page); position: sticky; left: 0; }
td { font-variant-numeric: tabular-nums; }
.outcome td { white-space: nowrap; } .outcome td:first-of-type { white-space: normal; min-width: 9em; }
.ranks td:nth-last-child(-n+3) { overflow-wrap: anywhere; min-width: 14em; }
.operations td:first-child { overflow-wrap: anywhere; min-width: 14em; }
.settings { table-layout: auto; }
.settings th:first-child { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .93em;
                           white-space: nowrap; }
.settings td { overflow-wrap: anywhere; min-width: 9em; } .settings .name { white-space: normal; max-width: none; }
.settings thead th { overflow-wrap: anywhere; min-width: 9em; }
tr.differs > * { background: var(--mark); }
.notes { margin: .6rem 0 0; padding-left: 1.2rem; color: var(--soft); }
footer { margin-top: 3rem; color: var(--soft); font-size: .88em; }
"""

# How every page begins, up to its title.
HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
"""

TEMPLATE = (
    HEAD
    + """<title>{{ title }} · fusemega report</title>
<style>
{{ style|safe }}</style>
</head>
<body>
{% macro run_name(i) %}
<span class="name" title="{{ runs[i].path }}"><span class="swatch" style="background:{{ colours[i] }}"></span>\
{{ runs[i].name }}</span>
{% endmacro %}
<header>
<h1>{{ title }}</h1>
<p class="soft">{% if runs|length == 1 %}{{ runs[0].path }}{% else %}Side by side. {{ differing|length }} of \
{{ settings|length }} settings differ.{% endif %}</p>
</header>

<h2>Outcome</h2>
<div class="wide"><table class="outcome">
<thead><tr><th>run</th>{% for head in outcome_head %}<th>{{ head }}</th>{% endfor %}</tr></thead>
<tbody>
{% for cells in outcome %}
<tr><th>{{ run_name(loop.index0) }}</th>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% if runs|selectattr("notes")|list %}
<ul class="notes">
{% for run in runs if run.notes %}<li>{{ run.name }}: {{ run.notes|join("; ") }}.</li>
{% endfor %}
</ul>
{% endif %}

<h2>Evaluations</h2>
{% if evaluations %}
<div class="wide"><table class="outcome">
<thead><tr><th>run</th><th>evaluation</th>\
{% for key in evaluations["keys"] %}<th>{{ key }}</th>{% endfor %}</tr></thead>
<tbody>
{% for run, i, name, cells in evaluations["lines"] %}
<tr><th>{{ run_name(i) }}</th><td>{{ name }}</td>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% else %}
<p class="soft">None: no result of <code>fusemega eval</code> lies in {{ "this folder" if runs|length == 1 else \
"these folders" }}.</p>
{% endif %}

<h2>Curves</h2>
{% if runs|length > 1 %}
<ul class="legend">
{% for run in runs %}<li>{{ run_name(loop.index0) }}</li>
{% endfor %}
</ul>
{% endif %}
{% if figures|selectattr("0.is_smoothed")|list %}
<p class="soft">Long series: the line is a running mean over a fiftieth of the run, the faint one the values.</p>
{% endif %}
<div class="charts" style="margin-top:1rem">
{% for chart, drawing in figures %}
<figure><figcaption>{{ chart.title }}<span>{{ chart.note }}</span></figcaption>{{ drawing|safe }}</figure>
{% endfor %}
</div>

{% for run, i, rows in ranks %}
{% if loop.first %}<h2>Ranks</h2>
<p class="soft">What each rank has last written about itself, in <code>monitor/</code>.</p>
{% endif %}
{% if runs|length > 1 %}<p class="soft">{{ run_name(i) }}</p>
{% endif %}
<div class="wide" style="margin-bottom:1rem"><table class="ranks">
<thead><tr>{% for head in rank_head %}<th>{{ head }}</th>{% endfor %}</tr></thead>
<tbody>
{% for cells in rows %}
<tr>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
{% for run, i, table, rows in profiles %}
{% if loop.first %}<h2>Top operations</h2>
{% endif %}
<p class="soft">{{ run_name(i) }} rank {{ table.rank }}, iterations {{ table.start }} to {{ table.stop - 1 }}, counted \
from 0: time inside each operation, without those that it calls. The trace is beside it, in \
<code>profile/rank{{ table.rank }}.trace.json.gz</code> (ui.perfetto.dev opens it).</p>
<div class="wide" style="margin-bottom:1rem"><table class="operations">
<thead><tr><th>operation</th><th>calls</th>\
<th>CPU, ms</th><th>CPU, share</th><th>GPU, ms</th><th>GPU, share</th></tr></thead>
<tbody>
{% for cells in rows %}
<tr>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
{% macro settings_table(rows, mark) %}
<div class="wide"><table class="settings">
<thead><tr><th>key</th>\
{% for run in runs %}<th>{{ run_name(loop.index0) if runs|length > 1 else "value" }}</th>{% endfor %}</tr></thead>
<tbody>
{% for key, cells in rows %}
<tr{% if mark and cells|unique|list|length > 1 %} class="differs"{% endif %}><th>{{ key }}</th>\
{% if cells|unique|list|length == 1 %}<td colspan="{{ cells|length }}">{{ cells[0] }}</td>\
{% else %}{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}{% endif %}</tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
{% if runs|length > 1 %}
<h2>Settings that differ</h2>
{% if differing %}{{ settings_table(differing, false) }}{% else %}<p class="soft">None.</p>{% endif %}
{% endif %}
<h2>{{ "All settings" if runs|length > 1 else "Settings" }}</h2>
{% if runs|length > 1 %}<p class="soft">One value: the same in every run.</p>{% endif %}
{{ settings_table(settings, true) }}
<footer>fusemega {{ version }}. Iterations and losses are from metrics.jsonl, settings from run.json of each run. \
The PNG files beside this page are the same curves.</footer>
</body>
</html>
"""
)
