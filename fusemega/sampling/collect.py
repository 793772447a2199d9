"""`fusemega collect`: the responses of all sources to each prompt, as rows of `prompt` and `responses`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from fusemega.errors import UserError, choose
from fusemega.files.output import new_file
from fusemega.runtime.console import say
from fusemega.sampling.engine import LENGTH, STOP
from fusemega.sampling.prompts import Prompts, PromptsConfig, read_prompts
from fusemega.sampling.responses import read_made, read_responses


@dataclass(frozen=True)
class Rules:
    """Which responses are taken.

    Attributes:
        keep_length: also those that reached the most tokens, which end in the middle.
        incomplete: also files in which responses are missing.
        min_responses: prompts with fewer responses are left out.
        sources: only these; empty: all.
    """

    keep_length: bool = False
    incomplete: bool = False
    min_responses: int = 2
    sources: tuple[str, ...] = ()


class Collected(BaseModel):
    """What was collected.

    Attributes:
        prompts: different prompts.
        duplicates: rows of the prompts file whose prompt an earlier row has.
        rows: prompts that became rows.
        too_few: prompts left out, with fewer responses than a row has.
        responses: source -> responses in the rows.
        dropped: source -> reason (the finish_reason, or "empty") -> responses dropped.
        merged: source -> responses left out because an earlier one to the same prompt has the same text.
        missing: source -> responses that the file lacks.
        other_prompts: source -> responses to prompts that are not in the prompts file, or beyond `sampling.n`.
    """

    model_config = ConfigDict(frozen=True)

    prompts: int
    duplicates: int
    rows: int
    too_few: int
    responses: dict[str, int]
    dropped: dict[str, dict[str, int]]
    merged: dict[str, int]
    missing: dict[str, int]
    other_prompts: dict[str, int]


@dataclass
class _Source:
    """One file's responses, by prompt."""

    name: str
    path: Path
    n: int
    by_key: dict[str, list[Mapping[str, Any]]]
    dropped: Counter[str]
    missing: int = 0
    merged: int = 0
    others: int = 0


def collect(prompts: PromptsConfig, out: Path, responses: Sequence[Path], rules: Rules) -> Collected:
    """Writes `out`: a row for each prompt, in the order of the prompts, with its responses in the order of the files.

    A row has what the prompt's row has of domain, answer, tests, entry_point and id; a response has text, source,
    sample and tokens.

    Raises:
        UserError: unusable prompts; a file that is no responses file or lacks responses; two files of one source; an
            unknown source; no row; `out` exists.
    """
    if out.exists():
        raise UserError(f"{out}: exists; nothing is overwritten")
    asked = read_prompts(prompts)
    sources = [_read(path, asked, rules) for path in _chosen(responses, rules)]
    rows = [_row(asked, key, sources) for key in asked.by_key]
    kept = [row for row in rows if len(row["responses"]) >= max(rules.min_responses, 1)]
    _tell(sources)
    if not kept:
        most = max(len(row["responses"]) for row in rows)
        raise UserError(
            f"{out}: no prompt has {max(rules.min_responses, 1)} responses; the most is {most} (--min-responses)"
        )
    with new_file(out) as file:
        for row in kept:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    counts = Counter(response["source"] for row in kept for response in row["responses"])
    return Collected(
        prompts=len(asked),
        duplicates=asked.duplicates,
        rows=len(kept),
        too_few=len(rows) - len(kept),
        responses={source.name: counts[source.name] for source in sources},
        dropped={source.name: dict(source.dropped) for source in sources},
        merged={source.name: source.merged for source in sources},
        missing={source.name: source.missing for source in sources},
        other_prompts={source.name: source.others for source in sources},
    )


def _chosen(paths: Sequence[Path], rules: Rules) -> list[Path]:
    """The files of the wanted sources."""
    names: dict[str, Path] = {}
    for path in paths:
        name = read_made(path).source
        if name in names:
            raise UserError(f"{path}: of the source {name!r}, as {names[name]} is; a source has one file")
        names[name] = path
    for wanted in rules.sources:
        choose("--source", wanted, names)
    return [path for name, path in names.items() if not rules.sources or name in rules.sources]


def _read(path: Path, prompts: Prompts, rules: Rules) -> _Source:
    made = read_made(path)
    source = _Source(made.source, path, made.n, {}, Counter())
    found = 0
    for row in read_responses(path, made):
        if row["key"] not in prompts.by_key or row["sample"] >= made.n:
            source.others += 1
            continue
        found += 1
        reason = row["finish_reason"]
        if reason != STOP and not (reason == LENGTH and rules.keep_length):
            source.dropped[reason] += 1
        elif not row["text"].strip():
            source.dropped["empty"] += 1
        else:
            source.by_key.setdefault(row["key"], []).append(row)
    source.missing = len(prompts) * made.n - found
    if source.missing and not rules.incomplete:
        raise UserError(
            f"{path}: lacks {source.missing} of {len(prompts) * made.n} responses to these prompts; run `fusemega "
            "sample` again, or take what is there with --incomplete"
        )
    return source


def _row(prompts: Prompts, key: str, sources: Sequence[_Source]) -> dict[str, Any]:
    prompt = prompts.by_key[key]
    responses = []
    for source in sources:
        texts: set[str] = set()
        for row in sorted(source.by_key.get(key, ()), key=lambda row: row["sample"]):
            if row["text"] in texts:
                source.merged += 1
                continue
            texts.add(row["text"])
            responses.append(
                {"text": row["text"], "source": source.name, "sample": row["sample"], "tokens": row["tokens"]}
            )
    return {"prompt": list(prompt.messages), "responses": responses, **prompt.about}


def _tell(sources: Sequence[_Source]) -> None:
    for source in sources:
        parts = [f"{count} dropped ({reason})" for reason, count in source.dropped.most_common()]
        parts += [f"{source.merged} with the text of another one"] * bool(source.merged)
        parts += [f"{source.missing} missing"] * bool(source.missing)
        parts += [f"{source.others} to other prompts or beyond sampling.n"] * bool(source.others)
        total = sum(map(len, source.by_key.values())) - source.merged
        say(f"{source.name}: {total} responses{''.join(f'; {part}' for part in parts)}")
