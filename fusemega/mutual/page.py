"""The page of a run: each decision with its numbers, and pairs that were believed and dropped."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jinja2

from fusemega import __version__
from fusemega.mutual.figures import draw_differences, draw_drift, draw_kept, draw_win_rates
from fusemega.report.charts import as_svg
from fusemega.report.page import write_page
from fusemega.report.page_template import HEAD, STYLE

_SHOWN = 900  # characters of a text
_TEMPLATE = (
    HEAD
    + """<title>{{ title }}</title>
<style>
{{ style|safe }}td.number, th.number { text-align: right; } tr.best > * { font-weight: 700; }
.decision { font-size: 1.05rem; max-width: 62em; } .wide { margin: .6rem 0; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: .15rem 0 .6rem; }
details { border: 1px solid var(--line); border-radius: 10px; margin: .5rem 0; padding: .3rem .9rem; }
summary { cursor: pointer; font-weight: 600; }
.example { border-top: 1px solid var(--line); padding: .7rem 0 .2rem; }
.role { font-weight: 600; }
</style>
</head>
<body>
{% macro table(heads, rows, best=none) %}
<div class="wide"><table><thead><tr>{% for head in heads %}<th{% if not loop.first %} class="number"{% endif %}>\
{{ head }}</th>{% endfor %}</tr></thead><tbody>
{% for row in rows %}<tr{% if loop.index0 == best %} class="best"{% endif %}>\
{% for cell in row %}{% if loop.first %}<th>{{ cell }}</th>{% else %}<td class="number">{{ cell }}</td>{% endif %}\
{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endmacro %}
{% macro pair(example) %}
<div class="example"><p class="soft">dr {{ number(example.difference) }}: reward {{ number(example.reward_new) }}, \
of the policy before {{ number(example.reward_old) }}</p>
<p class="role">prompt</p><div class="text">{{ cut(example.prompt[-1].content) }}</div>
<p class="role">the new policy</p><div class="text">{{ cut(example.new) }}</div>
<p class="role">the policy before</p><div class="text">{{ cut(example.old) }}</div></div>
{% endmacro %}
<header><h1>{{ title }}</h1>
<p class="soft">{{ portions }}</p></header>
<p class="decision">{{ verdict }}</p>

{% if drift %}
<h2>The policies</h2>
<p class="soft">On the prompts on which policies are compared. KL(policy || another) over the policy's own responses, \
nats a token.</p>
<div class="charts"><figure><figcaption>Length and distance</figcaption>{{ drift|safe }}</figure></div>
{{ table(["policy", "mean tokens", "mean reward before the M step", "KL to the first", "KL to the one before"], \
policies) }}
{% endif %}
{% if accuracies %}
<h2>The reward models</h2>
<p class="soft">How often the chosen response has the higher reward, on the pairs of evaluation.pairs.</p>
{{ table(["reward model", "accuracy", "pairs"], accuracies) }}
{% endif %}

{% for one in iterations %}
<h2>Iteration {{ one.number }}: the policy</h2>
<p>{{ one.pairs }}</p>
<p class="decision">{{ one.decision }}</p>
<div class="charts"><figure><figcaption>Win rate over the policy before\
<span>bars: 95% of the bootstrap's draws</span></figcaption>{{ one.win_rates|safe }}</figure></div>
{{ table(["checkpoint", "win rate", "low", "high", "wins", "ties", "losses", "mean reward", "mean tokens", "cut", \
"empty"], one.candidates, one.best) }}
{% if one.reward %}
<h2>Iteration {{ one.number }}: the reward model</h2>
<p class="decision">{{ one.reward.decision }}</p>
<p>{{ one.reward.trained }}</p>
<div class="charts">
<figure><figcaption>dr<span>dark: believed</span></figcaption>{{ one.reward.histogram|safe }}</figure>
<figure><figcaption>Share kept by another eps</figcaption>{{ one.reward.kept|safe }}</figure></div>
{% for name, shown in one.examples %}
<details><summary>{{ name }} ({{ shown|length }} shown)</summary>
{% for example in shown %}{{ pair(example) }}{% endfor %}</details>
{% endfor %}
{% endif %}
{% endfor %}
<footer>fusemega {{ version }}. The same numbers are in summary.json.</footer>
</body>
</html>
"""
)


def write_mutual_page(
    summary: Mapping[str, Any], examples: Mapping[int, Mapping[str, list[dict[str, Any]]]], folder: Path
) -> Path:
    """Writes the folder `report` in the output folder; an older one there is replaced. Returns the page.

    Args:
        summary: as in summary.json.
        examples: iteration -> `kept` and `dropped` -> pairs.
        folder: the recipe's output folder.

    Raises:
        UserError: as `fusemega.report.page.write_report`.
    """
    return write_page(folder / "report", mutual_page(summary, examples), [])


def mutual_page(summary: Mapping[str, Any], examples: Mapping[int, Mapping[str, list[dict[str, Any]]]]) -> str:
    """The page's HTML; arguments as `write_mutual_page`."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    policies = _policies(summary)
    return environment.from_string(_TEMPLATE).render(
        version=__version__,
        style=STYLE,
        title="Mutual-Taught",
        portions=_portions(summary),
        verdict=_verdict(summary),
        drift=_drift(policies) if len(policies) > 1 else "",
        policies=[[f"pi_{row['policy']}", *(_number(row[key]) for key in _POLICY)] for row in policies],
        accuracies=[
            [f"r_{t}", _number(said["accuracy"]), f"{said['pairs']:,}"]
            for t, said in summary["reward_accuracy"].items()
        ],
        iterations=[_iteration(one, examples.get(one["iteration"], {})) for one in summary["iterations"]],
        number=_number,
        cut=lambda text: text if len(text) <= _SHOWN else f"{text[:_SHOWN]} … ({len(text) - _SHOWN} more characters)",
    )


_POLICY = ("mean_tokens", "mean_reward", "kl_from_start", "kl_from_before")


def _policies(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first policy, and those that were kept. A reward is by the reward model that chose the policy."""
    rows: list[dict[str, Any]] = []
    for one in summary["iterations"]:
        if not rows:
            rows.append({"policy": 0, **one["compared"]["before"], "kl_from_start": 0.0, "kl_from_before": None})
        if one["decision"]["kept"]:
            best = next(c for c in one["compared"]["candidates"] if c["checkpoint"] == one["decision"]["checkpoint"])
            kl = one.get("kl_from_start")
            rows.append(
                {
                    "policy": one["iteration"],
                    **best,
                    "kl_from_start": kl,
                    "kl_from_before": one.get("kl_from_before", kl),
                }
            )
    return rows


def _drift(policies: list[dict[str, Any]]) -> str:
    lengths = [row["mean_tokens"] or 0.0 for row in policies]
    distances = [row["kl_from_start"] or 0.0 for row in policies]
    return as_svg(partial(draw_drift, lengths, distances), "length and distance of the policies", salt="drift")


def _portions(summary: Mapping[str, Any]) -> str:
    settings = summary["settings"]
    said = [f"{name} {count:,}" for name, count in (summary["splits"] or {}).items() if count]
    mix = "all" if settings["mix"] is None else f"{settings['mix']:g} ranked pairs for each pseudo-pair"
    return f"Prompts: {', '.join(said)}. Seed {settings['seed']}, tau {settings['tau']:g}, mix: {mix}."


def _verdict(summary: Mapping[str, Any]) -> str:
    result = f"The result is pi_{summary['policy']}, {summary['result']}"
    stops = [reason for name, reason in summary["stopped"].items() if name.startswith("choose-")]
    if stops:
        return f"{result}: {stops[0]}."
    return f"{result}, after {len(summary['iterations'])} of {summary['settings']['iterations']} iterations."


def _iteration(one: Mapping[str, Any], examples: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What the template shows of one iteration."""
    t, decided, pairs = one["iteration"], one["decision"], one["pairs"]
    candidates = one["compared"]["candidates"]
    removed = "".join(f"; {count:,} without a pair ({rule.strip(': ')})" for rule, count in pairs["removed"].items())
    what = (
        f"it is pi_{t}"
        if decided["kept"]
        else f"that is below tau {decided['tau']:g}, so pi_{t - 1} stays and the work ends"
    )
    return {
        "number": t,
        "pairs": f"{pairs['pairs']:,} length-controlled pairs of {pairs['prompts']:,} prompts{removed}. Mean length of "
        f"the chosen response {pairs['chosen']:.1f} {pairs['unit']}, of the rejected one {pairs['rejected']:.1f}; the "
        f"chosen one is longer in {pairs['chosen_longer']:.1%}.",
        "decision": f"Checkpoint {decided['checkpoint']} has the best win rate, {decided['win_rate']:.4f}: {what}.",
        "win_rates": as_svg(partial(draw_win_rates, candidates, decided["tau"]), f"win rates {t}", salt=f"rates-{t}"),
        "candidates": [
            [
                c["checkpoint"],
                *(_number(c[key]) for key in ("rate", "low", "high", "wins", "ties", "losses")),
                *(_number(c[key]) for key in ("mean_reward", "mean_tokens", "cut", "empty")),
            ]
            for c in candidates
        ],
        "best": [c["checkpoint"] for c in candidates].index(decided["checkpoint"]),
        "reward": _reward(t, one["reward"]) if "reward" in one else None,
        "examples": [
            (f"Pairs that are {'believed' if name == 'kept' else name}", shown) for name, shown in examples.items()
        ],
    }


def _reward(t: int, said: Mapping[str, Any]) -> dict[str, Any]:
    share = said["kept"] / said["pairs"]
    same = f"; {said['same_text']:,} pairs of two equal responses are left out" if said["same_text"] else ""
    held = ""
    if said["held_out"]:
        held = f" On {said['held_out']:,} believed pairs that are held out the new response has the higher reward in "
        held += f"{said['held_out_accuracy_before']:.1%} before"
        if after := said.get("held_out_accuracy_after"):
            held += f", and in {after['accuracy']:.1%} after the training"
        held += "."
    return {
        "decision": f"eps is {_number(said['epsilon'])}: {said['kept']:,} of {said['pairs']:,} pseudo-pairs are "
        f"believed ({share:.1%}), {said['kept_negative']:,} of them with a lower reward than before; "
        f"{said['dropped']:,} are dropped{same}.",
        "trained": f"r_{t} is trained from r_0 on {said['pseudo_trained_on']:,} pseudo-pairs and "
        f"{said['ranked_trained_on']:,} of {said['ranked_there']:,} ranked pairs.{held}",
        "histogram": as_svg(
            partial(draw_differences, said["histogram"], said["epsilon"]), f"differences {t}", salt=f"differences-{t}"
        ),
        "kept": as_svg(
            partial(draw_kept, said["kept_by_epsilon"], said["epsilon"]), f"share kept {t}", salt=f"kept-{t}"
        ),
    }


def _number(value: Any) -> str:
    """A number for a reader; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
