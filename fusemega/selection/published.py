"""`fusemega published`: the sets that FuseAI has published with FuseChat-3.0, as rows that `train` reads, counted.

    fusechat3-sft   hub id FuseAI/FuseChat-3.0-SFT-Data: conversations, dataset, source_model
    fusechat3-dpo   hub id FuseAI/FuseChat-3.0-DPO-Data: prompt, chosen, rejected, dataset, source_model

A turn is {"from", "value"} or {"role", "content"}. The counts are those of the table in the README of FuseChat-3.0. Of
the names in the column `dataset` one is known from published code that reads it, `openmathinstruct2`; the others are
recognised by what they must contain.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fusemega.errors import UserError, choose
from fusemega.files.output import check_output_file, new_file
from fusemega.runtime.console import say, warn
from fusemega.text.data import DataConfig, Source
from fusemega.text.document import parse_row
from fusemega.text.fields import BadRow, kind, string
from fusemega.text.row_progress import row_progress


@dataclass(frozen=True)
class PublishedPart:
    """A data set of FuseChat-3.0's table.

    Attributes:
        name: as in the table.
        known_by: its name in the column `dataset`, in small letters and digits, contains one of these.
        sft, dpo: its rows.
    """

    name: str
    known_by: tuple[str, ...]
    sft: int
    dpo: int


PARTS = (
    PublishedPart("UltraFeedback", ("ultrafeedback",), 20_439, 30_659),
    # Before Magpie-Pro, whose names are alike.
    PublishedPart("Magpie-Qwen2-Pro-200K-Chinese", ("magpieqwen2", "magpiezh", "magpiechinese"), 7_481, 0),
    PublishedPart("Magpie-Pro-DPO-100K", ("magpie",), 8_149, 12_225),
    PublishedPart("HelpSteer2", ("helpsteer",), 3_774, 5_661),
    PublishedPart("OpenMathInstruct-2", ("openmath",), 40_188, 11_615),
    PublishedPart("leetcode", ("leetcode",), 1_877, 1_236),
    PublishedPart("self-oss-instruct-sc2-exec-filter-50k", ("selfoss", "sc2"), 10_160, 2_732),
    PublishedPart("alpaca_gpt4_zh", ("alpaca",), 2_471, 0),
)
SETS: Mapping[str, Literal["sft", "dpo"]] = {"fusechat3-sft": "sft", "fusechat3-dpo": "dpo"}
_ROLES = {"human": "user", "gpt": "assistant"}
_USED = ("conversations", "messages", "prompt", "chosen", "rejected", "dataset", "source_model", "source")


def convert_published(name: str, data: str, out: Path, allow_other_counts: bool = False) -> dict[str, Any]:
    """Converts a published set.

    Args:
        name: one of `SETS`.
        data: file, folder, glob or hub id.
        out: JSONL file to write: `messages`, or `prompt`, `chosen` and `rejected`; and `dataset` and `source`.
        allow_other_counts: only tell where the counts are not those of the table.

    Returns:
        Rows, and rows of each data set by the table's names.

    Raises:
        UserError: an unusable row; other counts than the table's, by data set. Nothing is written then.
    """
    which = SETS[choose("SET", name, SETS)]
    check_output_file(out)
    source = Source(DataConfig(path=data))
    found: Counter[str] = Counter()
    ignored: Counter[str] = Counter()
    with new_file(out) as file, row_progress("converting") as advance:
        for row in source.rows():
            try:
                converted = _sft_row(row.value) if which == "sft" else _dpo_row(row.value)
                parse_row(converted)
            except BadRow as error:
                raise UserError(f"{source.names[row.file]}:{row.number}: {error.detail}") from None
            ignored.update(str(key) for key in row.value if key not in _USED)
            found[part_of(converted.get("dataset", ""))] += 1
            file.write(json.dumps(converted, ensure_ascii=False) + "\n")
            advance(1)
        if differences := compare_counts(found, which):
            line = f"{', '.join(source.names)}: other counts than FuseChat-3.0's table: {'; '.join(differences)}"
            if not allow_other_counts:
                raise UserError(f"{line}; --allow-other-counts would go on")
            warn(line)
    if ignored:
        say("fields left out: " + ", ".join(f"{count} ({name})" for name, count in ignored.items()))
    return {"wrote": str(out), "rows": sum(found.values()), "datasets": dict(sorted(found.items()))}


def part_of(dataset: str) -> str:
    """The table's name of a data set; what the table does not have keeps its own.

    >>> part_of("openmathinstruct2"), part_of("HuggingFaceH4/ultrafeedback_binarized"), part_of("other")
    ('OpenMathInstruct-2', 'UltraFeedback', 'other')
    """
    plain = re.sub("[^a-z0-9]", "", dataset.lower())
    known = (part.name for part in PARTS if any(word in plain for word in part.known_by))
    return next(known, dataset or "(no dataset)")


def compare_counts(found: Mapping[str, int], which: Literal["sft", "dpo"]) -> list[str]:
    """A line for each data set whose rows are not as many as the table says, and for each that it does not have."""
    table = {part.name: getattr(part, which) for part in PARTS}
    lines = [
        f"{name} has {found.get(name, 0):,} rows, the table says {rows:,}"
        for name, rows in table.items()
        if found.get(name, 0) != rows
    ]
    return lines + [
        f"{name!r} has {rows:,} rows, and is not in the table" for name, rows in found.items() if name not in table
    ]


def _sft_row(row: Any) -> dict[str, Any]:
    _check_row(row)
    name = next((name for name in ("conversations", "messages") if row.get(name) is not None), None)
    if name is None:
        raise BadRow("unknown shape", f"the row has no conversations or messages; found {', '.join(map(str, row))}")
    return {"messages": _turns(row[name], name), **_origin(row)}


def _dpo_row(row: Any) -> dict[str, Any]:
    _check_row(row)
    prompt = next((name for name in ("prompt", "conversations") if row.get(name) is not None), None)
    missing = [*(() if prompt else ("prompt",)), *(name for name in ("chosen", "rejected") if row.get(name) is None)]
    if prompt is None or missing:
        raise BadRow("unknown shape", f"the row has no {missing[0]}; found {', '.join(map(str, row))}")
    turns = {name: _turns(row[name], name) for name in (prompt, "chosen", "rejected")}
    return {"prompt": turns[prompt], "chosen": turns["chosen"], "rejected": turns["rejected"], **_origin(row)}


def _check_row(row: Any) -> None:
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, Mapping):
        raise BadRow("wrong type", f"a row is an object, found {kind(row)}")


def _turns(value: Any, name: str) -> list[dict[str, str]]:
    """Messages; one turn may stand without its list, and a string is a turn of the user's or, of a response, the
    assistant's."""
    if isinstance(value, str):
        return [{"role": "user" if name in ("prompt", "conversations") else "assistant", "content": value}]
    turns: Sequence[Any] = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise BadRow("wrong type", f"{name} is a list of turns, found {kind(value)}")
    found = []
    for i, turn in enumerate(turns):
        role, content = ("from", "value") if "from" in turn else ("role", "content")
        said = string(turn.get(role), f"{name}[{i}].{role}")
        found.append({"role": _ROLES.get(said, said), "content": string(turn.get(content), f"{name}[{i}].{content}")})
    return found


def _origin(row: Mapping[str, Any]) -> dict[str, str]:
    source = row.get("source_model") or row.get("source")
    dataset = row.get("dataset")
    return ({"dataset": string(dataset, "dataset")} if dataset is not None else {}) | (
        {"source": string(source, "source_model")} if source is not None else {}
    )
