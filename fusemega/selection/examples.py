"""Examples of each rule for a reader: the first prompts in the order of the seed, with the responses compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusemega.selection.groups import ResponseTable
from fusemega.selection.protocol import Candidate, Protocol
from fusemega.selection.summary import Selected

EACH = 10  # examples of a rule
_SHOWN = 900  # characters of a text


@dataclass(frozen=True)
class ShownResponse:
    """A response, or another text, as the page shows it: what it is, what is known of it, and its text."""

    role: str
    facts: str
    text: str


@dataclass(frozen=True)
class Example:
    """A prompt with what was chosen, or why nothing was."""

    prompt: str
    facts: str
    responses: Sequence[ShownResponse]


def examples_of(
    table: ResponseTable, protocol: Protocol, selected: Sequence[Selected], about: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[Example]]:
    """Rule -> its first examples; sorted: the sets first, then the rules that removed prompts.

    Args:
        about: key -> what is known of a prompt that was removed as one that is like another text.
    """
    found: dict[tuple[bool, str], list[Example]] = {}
    for one in selected:
        shown = found.setdefault((one.set is None, one.rule), [])
        if len(shown) < EACH:
            shown.append(_example(table, protocol, one, about.get(one.key, {})))
    return {rule: examples for (_, rule), examples in sorted(found.items())}


def _example(table: ResponseTable, protocol: Protocol, one: Selected, about: Mapping[str, Any]) -> Example:
    row = table.rows[one.key]
    names = [f"{name} {row.about[name]}" for name in ("id", "dataset") if name in row.about]
    facts = [*names, *(f"{name} {about[name]}" for name in ("overlap", "similarity") if name in about)]
    if one.set is None and one.offer.margins:
        facts.append("margins " + ", ".join(f"{margin:.4g}" for margin in one.offer.margins))
    responses = [_shown(table, role, each) for role, each in zip(_roles(protocol, one), one.chosen, strict=False)]
    if "like" in about:
        responses.append(ShownResponse("is like", str(about.get("set", "")), cut(str(about["like"]))))
    return Example(cut(row.text), ", ".join(facts), responses)


def _roles(protocol: Protocol, one: Selected) -> Sequence[str]:
    if one.set == "sft":
        return ("chosen",) * len(one.chosen)
    if protocol.preference_form == "pair":
        return ("chosen", "rejected")
    if protocol.sft_form == "completion":
        return ("best of the sources", "best of the target", "worst of the target")
    return ("compared",) * len(one.chosen)


def _shown(table: ResponseTable, role: str, one: Candidate) -> ShownResponse:
    facts = [one.source] if one.source else []
    facts += [f"reward {one.reward:.4g}"] if one.reward is not None else []
    facts += [("correct" if one.correct else "incorrect")] if one.correct is not None else []
    facts.append(f"{one.length} {table.unit}")
    return ShownResponse(role, ", ".join(facts), cut(table.texts[one.text]))


def cut(text: str) -> str:
    """The beginning of a long text, and how much was left out."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} … ({len(text) - _SHOWN} more characters)"
