"""A page about a vocabulary map: which tokens have a counterpart, which do not, and which positions are aligned.

Shape suffixes: S ids of the source's vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from fusemega import __version__
from fusemega.align.align import Aligned
from fusemega.align.kinds import KINDS
from fusemega.align.make_map import as_text, identical
from fusemega.align.positions import shared_positions
from fusemega.align.vocabulary import Vocabulary
from fusemega.report import charts
from fusemega.report.align_positions import RowsThrough, evidence_table, verdict_table
from fusemega.report.charts import Chart, Curve, short
from fusemega.report.page import write_page
from fusemega.report.page_template import HEAD, STYLE
from fusemega.text.chat import render_text
from fusemega.text.document import Text
from fusemega.text.sample import annotate
from fusemega.text.tokenizer import Tokenizer

EXAMPLE = "Naïve tokenizers disagree: antidisestablishmentarianism, 12345 今天."
_LISTED = 24  # lines of a table
_BINS = 32
_CELLS, _EXAMPLES = 12, 6  # cells of a table, tokens of a cell

TEMPLATE = (
    HEAD
    + """<title>{{ title }}</title>
<style>
{{ style|safe }}code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .93em; white-space: pre; }
.tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 1rem; }
.tables h2 { margin-top: 1.4rem; }
</style>
</head>
<body>
{% macro table(head, rows) %}
<div class="wide"><table><thead><tr>{% for name in head %}<th>{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for row in rows %}
<tr>{% for cell in row %}<td>{% if cell is string and cell.startswith("\\x00") %}<code>{{ cell[1:] }}</code>\
{% else %}{{ cell }}{% endif %}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
<header><h1>{{ title }}</h1>
<p class="soft">{{ names[0] }} → {{ names[1] }}</p></header>

<h2>Coverage</h2>
{{ table(coverage[0], coverage[1]) }}
<p class="soft">{{ kind_note }} A row's probability on ids that keep none is not lost: it joins the row's \
residual, "any other token".</p>
<div class="charts" style="margin-top:1rem">
{% for chart, drawing in figures %}
<figure><figcaption>{{ chart.title }}<span>{{ chart.note }}</span></figcaption>{{ drawing|safe }}
<ul class="legend" style="position:static;border:0;background:none">{% for curve in chart.curves %}\
<li><span class="swatch" style="background:{{ colours[curve.index] }}"></span>{{ curve.name }}</li>{% endfor %}</ul>
</figure>
{% endfor %}
</div>

<h2>Which position supervises which, and what is matched</h2>
<p>A teacher's row at position <i>i</i> is its distribution of token <i>i</i> + 1: what it expects after the byte at \
which its token <i>i</i> ends. It supervises the target's position that ends at the same byte, whatever the tokens \
before and after it are, and where the target has no token that ends there, it supervises nothing. Whole rows of \
<b>ids</b> are matched, each id with its probability through this map; the teacher's argmax, and the token that \
really follows, play no part in it.</p>
<p>The text <code>{{ example_text }}</code>:</p>
{{ table(["target position", "its token", "ends at byte", "supervised by the source's position", "whose token is",
          "so its row tells what follows", "label of the target"], example) }}

{% if verdicts %}
<h2>Is the map right?</h2>
<p>At a shared position both tokenizers go on with a token of the same text. The two tokens end at the same byte \
(equal), or one of them is longer. The map sends the source's token to the target's{% if cells %}, or to its cell\
{% endif %} (right), to another one, or to nothing. A row's probability goes the same way.</p>
{{ table(verdicts[0], verdicts[1]) }}
<p class="soft">{{ judged }} of the corpus, without the first position of each message. Unrelated: where a next token \
ends is not known.</p>
{% endif %}
{% if evidence %}
<p>The rows of <code>{{ store }}</code>, through this map: the mean probability of the target's own next token (the \
label){% if cells %}, or of its cell{% endif %}. A useful teacher says more of it than its frequency does.</p>
{{ table(evidence[0], evidence[1]) }}
<p class="soft">At most 64 samples, spread over the corpus. Unigram: how frequent the label is at the other positions \
of the kind.</p>
{% for complaint in complaints %}
<p><b>{{ complaint }}</b></p>
{% endfor %}
{% endif %}

<h2>One to many</h2>
<p class="soft">Several source tokens may share a target token; their probabilities add.</p>
{{ table(["source tokens that share one", "target tokens", "share of the mapped source tokens"], sharing) }}
{% if cell_sizes %}
<h2>Cells</h2>
<p class="soft">A cell is a set of target tokens that the source's tokens cannot tell apart at a shared position. \
A row gives the probability of the whole cell; the label teaches which of the cell's tokens comes.</p>
{{ table(["target tokens in a cell", "cells", "share of the target's ids"], cell_sizes) }}
{{ table(["largest cells", "target tokens", "such as", "source tokens"], largest_cells) }}
{% endif %}
<div class="tables">
{% for heading, note, head, rows in tables if rows %}
<section><h2>{{ heading }}</h2><p class="soft">{{ note }}</p>{{ table(head, rows) }}</section>
{% endfor %}
</div>
<footer>fusemega {{ version }}. ␣ is a space; ‹E2› a byte that is no character by itself.</footer>
</body>
</html>
"""
)


def write_align_page(made: Aligned, out: Path, rows: RowsThrough | None = None) -> Path:
    """Writes the folder `out` with the page and its charts. Returns the page.

    Args:
        rows: what a store's rows say through the map.

    Raises:
        UserError: as `fusemega.report.page.write_report`.
    """
    drawn = _charts(made)
    return write_page(out, render(made, drawn, rows), drawn)


def render(made: Aligned, drawn: Sequence[Chart], rows: RowsThrough | None = None) -> str:
    """The page's HTML."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE).render(
        version=__version__,
        style=STYLE,
        title=f"Vocabulary map, {made.map.kind}",
        names=[vocabulary.source for vocabulary in made.vocabularies],
        coverage=_coverage(made),
        kind_note=KINDS[made.map.kind].summary,
        figures=[(chart, charts.svg(chart)) for chart in drawn],
        colours=charts.COLOURS,
        example_text=EXAMPLE,
        example=worked_example(*made.tokenizers, *made.vocabularies),
        sharing=_by_size(made.map.statistics["sharing"]),
        cell_sizes=_by_size(made.map.statistics.get("cell_sizes", {})),
        largest_cells=_largest_cells(made),
        tables=_tables(made),
        cells=len(made.map.cell_T) > 0,
        verdicts=None if made.verdicts is None else verdict_table(made.verdicts),
        judged="" if made.verdicts is None else f"{made.verdicts.samples:,} samples",
        store="" if rows is None else rows.store,
        evidence=evidence_table(rows.found) if rows else None,
        complaints=rows.complaints if rows else (),
    )


def worked_example(
    source: Tokenizer, target: Tokenizer, source_vocabulary: Vocabulary, target_vocabulary: Vocabulary
) -> list[list[Any]]:
    """A line for each position of the target on `EXAMPLE`, with the source's position that supervises it."""
    rendered = render_text(Text(EXAMPLE, 0))
    ours, theirs = (annotate(rendered, t.encode([EXAMPLE])[0], t) for t in (target, source))
    in_source, in_target = shared_positions(theirs.end_bytes[:-1], ours.end_bytes[:-1])
    taught_by = dict(zip(in_target.tolist(), in_source.tolist(), strict=True))
    our_ids, their_ids = ours.ids.tolist(), theirs.ids.tolist()
    lines: list[list[Any]] = []
    for position, end in enumerate(ours.end_bytes[:-1].tolist()):
        own = [position, shown(target_vocabulary, our_ids[position]), end if end >= 0 else "–"]
        label = shown(target_vocabulary, our_ids[position + 1])
        if position in taught_by:
            other = taught_by[position]
            token, following = (shown(source_vocabulary, their_ids[i]) for i in (other, other + 1))
            row_of = [other, token, following]
        else:
            row_of = ["none", "", ""]
        lines.append([*own, *row_of, label])
    return lines


def shown(vocabulary: Vocabulary, token: int) -> str:
    """A token for a reader, with a NUL before it that tells the template that it is one; special tokens by their form.

    Bytes that are no character by themselves (lone surrogates in `as_text`) are written as ‹E2›.
    """
    content = vocabulary.contents[token]
    if content is None:
        return "\0" + vocabulary.forms[token]
    text = as_text(content).replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return "\0" + "".join(
        f"‹{ord(c) - 0xDC00:02X}›" if 0xDC80 <= ord(c) <= 0xDCFF else c if c.isprintable() else f"\\u{ord(c):04x}"
        for c in text
    )


def _coverage(made: Aligned) -> tuple[list[str], list[list[str]]]:
    facts = made.map.statistics
    rows = [["of the source's tokens", *_shares(facts["source_tokens"], facts["mapped"], facts["identical"])]]
    if "corpus" in facts:
        corpus = facts["corpus"]
        rows.append(["of the corpus's tokens", *_shares(corpus["tokens"], corpus["mapped"], corpus["identical"])])
    reached = facts["target_tokens_reached"]
    rows.append(
        [
            "target tokens reached",
            f"{made.map.target_size:,}",
            f"{reached:,} ({reached / made.map.target_size:.1%})",
            "",
        ]
    )
    return ["", "number", "keep an id", "by identical bytes"], rows


def _shares(total: int, mapped: int, same: int) -> list[str]:
    return [f"{total:,}", *(f"{count:,} ({count / max(total, 1):.1%})" for count in (mapped, same))]


def _by_size(counts_of: dict[str, int]) -> list[list[str]]:
    """Lines of a table: sizes, how many there are of them, their share of all members."""
    counts = {int(n): count for n, count in counts_of.items()}
    rows = []
    for low, high in ((1, 1), (2, 2), (3, 3), (4, 9), (10, 99), (100, 1 << 30)):
        inside = {n: count for n, count in counts.items() if low <= n <= high}
        if inside:
            name = f"{low}" if low == high else f"{low} or more" if high > 99 else f"{low} to {high}"
            share = sum(n * c for n, c in inside.items()) / sum(n * c for n, c in counts.items())
            rows.append([name, f"{sum(inside.values()):,}", f"{share:.1%}"])
    return rows


def _largest_cells(made: Aligned) -> list[list[str]]:
    """Lines of a table: the token that stands for a cell, the number of its tokens, some of them, the source's."""
    (source, target), (table_S, cell_T) = made.vocabularies, (made.map.table_S, made.map.cell_T)
    sizes = np.bincount(cell_T, minlength=target.size)
    rows = []
    for cell in np.argsort(-sizes, kind="stable")[:_CELLS].tolist():
        if sizes[cell] > 1:
            ours, theirs = np.flatnonzero(cell_T == cell)[:_EXAMPLES], np.flatnonzero(table_S == cell)[:_EXAMPLES]
            rows.append([shown(target, cell), f"{sizes[cell]:,}", _examples(target, ours), _examples(source, theirs)])
    return rows


def _examples(vocabulary: Vocabulary, ids: np.ndarray) -> str:
    return "\0" + "  ".join(shown(vocabulary, i)[1:] for i in ids.tolist())


def _tables(made: Aligned) -> list[tuple[str, str, list[str], list[list[Any]]]]:
    source, target = made.vocabularies
    table_S, same_S = made.map.table_S, identical(source, target)
    usable_S = np.array([content is not None for content in source.contents])
    frequency_S = made.frequency_S
    often_S = np.arange(len(table_S), 0, -1) if frequency_S is None else frequency_S
    order = np.argsort(-often_S, kind="stable")
    if frequency_S is not None:
        order = order[frequency_S[order] > 0]
    by = "most frequent first" if frequency_S is not None else "lowest ids first: usually the most frequent"

    def lines(which_S: np.ndarray, step: int = 1) -> list[list[Any]]:
        return [line(u) for u in order[which_S[order]][:_LISTED:step].tolist()]

    def line(u: int) -> list[Any]:
        mapped = shown(target, int(table_S[u])) if table_S[u] >= 0 else "nothing"
        often = [] if frequency_S is None else [f"{frequency_S[u]:,}"]
        return [shown(source, u), mapped, *often]

    head = ["source", "target", *([] if frequency_S is None else ["in the corpus"])]
    moved_S = usable_S & ~same_S & (table_S >= 0)
    far = [(u, _far(source, target, u, int(table_S[u]))) for u in np.flatnonzero(moved_S).tolist()]
    worst = [[*line(u), distance] for u, distance in sorted(far, key=lambda pair: -pair[1])[:_LISTED]]
    popular = np.argsort(-np.bincount(table_S[table_S >= 0], minlength=target.size), kind="stable")[:12]
    shared = []
    for p in popular.tolist():
        group = np.flatnonzero(table_S == p)
        if len(group) > 1:
            shared.append([shown(target, p), f"{len(group):,}", _examples(source, group[:_EXAMPLES])])
    return [
        ("Tokens that keep no id", by, head, lines(usable_S & (table_S < 0))),
        ("Tokens that become another", by, head, lines(moved_S)),
        ("Furthest from what they become", "by edit distance", [*head, "distance"], worst),
        ("Most shared target tokens", "", ["target", "source tokens", "such as"], shared),
        ("Tokens of the same bytes", f"every third, {by}", head, lines(same_S, step=3)),
    ]


def _far(source: Vocabulary, target: Vocabulary, u: int, p: int) -> int:
    from rapidfuzz.distance import Levenshtein

    content, other = source.contents[u], target.contents[p]
    return 0 if content is None or other is None else Levenshtein.distance(as_text(content), as_text(other))


def _charts(made: Aligned) -> list[Chart]:
    """Coverage along the source's ids, and how far tokens are moved."""
    source, target = made.vocabularies
    usable = np.flatnonzero([content is not None for content in source.contents])
    same_S = identical(source, target)
    mapped, same = made.map.table_S[usable] >= 0, same_S[usable]
    parts = np.array_split(np.arange(len(usable)), min(_BINS, max(len(usable), 1)))
    curves = [
        Curve(
            name, index, [(float(usable[part].mean()), 100 * float(values[part].mean())) for part in parts if len(part)]
        )
        for index, (name, values) in enumerate((("keep an id", mapped), ("of the same bytes", same)))
    ]
    note = "percent of the tokens around an id; low ids are usually frequent"
    drawn = [Chart("coverage", "Coverage along the source's ids", note, "source id", curves, short, from_zero=True)]
    histogram = made.map.statistics.get("distances")
    if histogram:
        points = [(float(d), float(count)) for d, count in enumerate(histogram)]
        curve = Curve("source tokens without one of the same bytes", 2, points)
        drawn.append(
            Chart("distances", "Distance to the nearest token", "edits", "edits", [curve], short, from_zero=True)
        )
    return drawn
