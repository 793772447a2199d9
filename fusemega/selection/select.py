"""`fusemega select`: training sets from groups of scored responses, by a published protocol.

OUT/
  sft.jsonl           rows for SFT
  preference.jsonl    pairs or groups for preference optimisation
  left.jsonl          prompts for a later step
  removed.jsonl       every prompt that is in none of them, with the rule
  selection.json      counts, margins, lengths, sources
  selection.html      the same as a page, with examples

A set that the protocol does not make has no file. The same rows give the same bytes in any order, and the same sets if
the responses of a prompt are spread over rows and files in another way.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusemega.errors import UserError
from fusemega.files.output import new_folder, refuse_existing
from fusemega.runtime.console import say
from fusemega.selection.groups import ResponseTable, read_groups
from fusemega.selection.known_texts import read_known
from fusemega.selection.ngrams import Contaminants, Grams, near_duplicates
from fusemega.selection.page import selection_page
from fusemega.selection.protocol import (
    SETS,
    CandidatePrompt,
    Offer,
    Protocol,
    SetName,
    divide,
    place_in_order,
    protocol_named,
)
from fusemega.selection.rows import completion_row, group_row, pair_row, prompt_row
from fusemega.selection.run_file import SelectRun
from fusemega.selection.summary import Selected, summary_of
from fusemega.selection.texts import opened_texts
from fusemega.text.row_progress import row_progress

SUMMARY, PAGE, REMOVED = "selection.json", "selection.html", "removed.jsonl"
_FORMS = {"completion": completion_row, "pair": pair_row, "group": group_row}


@dataclass(frozen=True)
class Removed:
    """Why a prompt is in no set, before any protocol sees it.

    Attributes:
        rule: name of the rule.
        about: for removed.jsonl: what it is like.
    """

    rule: str
    about: Mapping[str, Any] = field(default_factory=dict)


def select(run: SelectRun) -> dict[str, Any]:
    """Makes the sets and their report. Returns what selection.json holds.

    Raises:
        UserError: bad input; a set that would be empty, with what the rules removed. Nothing is left behind then.
    """
    out = Path(run.output_dir)
    refuse_existing(out)
    protocol = protocol_named(run.protocol.name)(run.protocol)
    ignored: Counter[str] | None = Counter() if run.unknown_fields == "ignore" else None
    with new_folder(out) as folder, opened_texts(folder.parent / "texts") as texts:
        with row_progress("reading responses") as advance:
            table = read_groups(run.data, texts, run.sources, ignored, advance)
        _tell(table, ignored)
        protocol.check_sources(list(table.sources))
        removed = remove_known(table, run)
        removed |= remove_alike(table, run, removed)
        selected = apply(table, protocol, removed, run.seed)
        check_not_empty(selected, protocol)
        files = _write(folder, table, protocol, selected, removed)
        summary = summary_of(run, protocol, table, selected, files)
        (folder / SUMMARY).write_text(_readable(summary), encoding="utf-8")
        page = selection_page(summary, protocol, table, selected, {key: why.about for key, why in removed.items()})
        (folder / PAGE).write_text(page, encoding="utf-8")
    return summary


def remove_known(table: ResponseTable, run: SelectRun) -> dict[str, Removed]:
    """Key -> why, of the prompts that contain a text of a named set."""
    if run.decontaminate is None:
        return {}
    known = read_known(run.decontaminate.against)
    contaminants = Contaminants([text for _, text in known], run.decontaminate.ngram, run.decontaminate.threshold)
    found: dict[str, Removed] = {}
    for key, row in table.rows.items():
        if hit := contaminants.find(row.text):
            name, text = known[hit.text]
            about = {"set": name, "overlap": round(hit.overlap, 4), "like": text}
            found[key] = Removed(f"contains a text of {name}", about)
    return found


def remove_alike(table: ResponseTable, run: SelectRun, gone: Mapping[str, Removed]) -> dict[str, Removed]:
    """Key -> why, of the prompts that are near-duplicates of one that is kept: the first in the order of the seed."""
    if run.dedup is None:
        return {}
    grams = Grams(run.dedup.ngram)
    keys = sorted((key for key in table.rows if key not in gone), key=lambda key: place_in_order(run.seed, key))
    found = near_duplicates([grams(table.rows[key].text) for key in keys], run.dedup.threshold)
    return {
        keys[number]: Removed(
            "near-duplicate of another prompt",
            {
                "key_kept": keys[duplicate.kept],
                "similarity": round(duplicate.similarity, 4),
                "like": table.rows[keys[duplicate.kept]].text,
            },
        )
        for number, duplicate in found.items()
    }


def apply(table: ResponseTable, protocol: Protocol, removed: Mapping[str, Removed], seed: int) -> list[Selected]:
    """Every prompt with what became of it, in the order of the seed."""
    found: list[Selected] = []
    for prompt in table.prompts():
        domain = protocol.domain_of(prompt)
        why = removed.get(prompt.key)
        offer = Offer(why=why.rule, kinds=()) if why else _offer(protocol, prompt)
        mean = sum(candidate.length for candidate in prompt.candidates) / max(len(prompt.candidates), 1)
        found.append(Selected(prompt.key, domain, prompt.dataset, offer, mean))
    pools = ((each.key, f"{each.domain}\0{each.dataset}", each.offer) for each in found)
    sets = divide(pools, seed, protocol.sft_share)
    found.sort(key=lambda each: (place_in_order(seed, each.key), each.key))
    return [each.put_into(sets.get(each.key)) for each in found]


def _offer(protocol: Protocol, prompt: CandidatePrompt) -> Offer:
    if not prompt.candidates:
        return Offer(why="no response of the chosen sources", kinds=())
    return protocol.offer(prompt)


def check_not_empty(selected: Sequence[Selected], protocol: Protocol) -> None:
    """Refuses a selection of which a set is empty that the protocol makes.

    Raises:
        UserError: which rule removed how many prompts.
    """
    wanted = {kind for each in selected for kind in each.offer.kinds} or set(SETS[:2])
    if protocol.sft_share is not None:
        wanted -= {"sft"} if protocol.sft_share == 0 else set()
        wanted -= {"preference", "left"} if protocol.sft_share == 1 else set()
    for name in [name for name in SETS if name in wanted]:
        if any(each.set == name for each in selected):
            continue
        why = Counter(each.offer.why for each in selected if each.offer.why and each.set != name)
        reasons = [f"{count} ({rule})" for rule, count in why.most_common()]
        elsewhere = Counter(each.set for each in selected if each.set and not each.offer.why)
        reasons += [f"{count} are in {other}.jsonl" for other, count in elsewhere.items()]
        margins = sorted(margin for each in selected for margin in each.offer.margins)
        found = f"; margins found: {margins[0]:.4g} to {margins[-1]:.4g}" if margins and name == "preference" else ""
        raise UserError(f"{name}.jsonl would be empty: of {len(selected)} prompts {', '.join(reasons)}{found}")


def _write(
    folder: Path,
    table: ResponseTable,
    protocol: Protocol,
    selected: Sequence[Selected],
    removed: Mapping[str, Removed],
) -> dict[str, int]:
    """The rows of every set, and of what is in none. Returns file -> rows."""
    files: dict[str, int] = {}
    for name in SETS:
        members = [each for each in selected if each.set == name]
        if members:
            _write_rows(folder / f"{name}.jsonl", (_row(table, protocol, each, name) for each in members))
            files[f"{name}.jsonl"] = len(members)
    gone = [each for each in selected if each.set is None]
    if gone:
        _write_rows(folder / REMOVED, (_removed_row(table, each, removed.get(each.key)) for each in gone))
        files[REMOVED] = len(gone)
    return files


def _row(table: ResponseTable, protocol: Protocol, one: Selected, name: SetName) -> dict[str, Any]:
    prompt = table.rows[one.key]
    if name == "left":
        return prompt_row(prompt)
    form = protocol.sft_form if name == "sft" else protocol.preference_form
    return _FORMS[form](prompt, one.chosen, table.texts)


def _removed_row(table: ResponseTable, one: Selected, why: Removed | None) -> dict[str, Any]:
    return {"key": one.key, "rule": one.offer.why, **(why.about if why else {}), **prompt_row(table.rows[one.key])}


def _write_rows(path: Path, rows: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def _readable(summary: Mapping[str, Any]) -> str:
    """JSON with a line for each value, and a list of counts on one line."""
    text = json.dumps(summary, indent=1, ensure_ascii=False)
    return re.sub(r"\[([\s\d,]+)\]", lambda match: f"[{' '.join(match[1].split())}]", text) + "\n"


def _tell(table: ResponseTable, ignored: Counter[str] | None) -> None:
    counts = table.counts
    line = f"{len(table.rows)} prompts with {counts['responses']} responses of {len(table.sources)} sources"
    for name, words in (
        ("joined_rows", "rows joined with others of the same prompt"),
        ("equal_texts", "responses equal to another of their source left out"),
        ("of_other_sources", "responses of other sources left out"),
        ("undecided", "responses whose correctness could not be decided"),
    ):
        line += f"; {counts[name]} {words}" if counts[name] else ""
    if ignored:
        line += "; fields left out: " + ", ".join(f"{count} ({name})" for name, count in ignored.items())
    say(line)
