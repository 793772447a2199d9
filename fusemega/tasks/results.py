"""tasks.json, and the same as a table for the terminal."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusemega.errors import UserError
from fusemega.files.json_files import read_json
from fusemega.files.output import write_durably
from fusemega.runtime.kernel_packages import installed_version

FILE = "tasks.json"
_BEGUN = "run.json"
_PACKAGES = ("fusemega", "torch", "transformers", "megatron-core", "openai", "lm_eval")
_QUIET = ("rows", "judged", "tokens", "bytes")


def begin(out: Path, settings: Mapping[str, Any]) -> None:
    """Marks the output folder as one of `fusemega tasks`, with the settings of this call.

    Raises:
        UserError: see `check_folder`.
    """
    check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    write_durably(out / _BEGUN, json.dumps({"fusemega": "tasks", **settings}, indent=1) + "\n")


def check_folder(out: Path) -> None:
    """Refuses a folder with anything that `fusemega tasks` has not begun. Writes nothing.

    Raises:
        UserError: names it.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: exists and is not a folder")
    if not out.exists() or not any(out.iterdir()):
        return
    mark = out / _BEGUN
    if not mark.is_file() or read_json(mark).get("fusemega") != "tasks":
        raise UserError(f"{out}: exists and is not a folder of `fusemega tasks`; nothing is overwritten")


def versions() -> dict[str, str]:
    """The versions of what took part."""
    found = {name: installed_version(name) for name in _PACKAGES}
    return {"python": platform.python_version()} | {name: version for name, version in found.items() if version}


def write(out: Path, content: Mapping[str, Any]) -> Path:
    """Writes tasks.json, in place of an earlier call's."""
    write_durably(out / FILE, json.dumps(_plain({"fusemega": "tasks", **content}), indent=1, ensure_ascii=False) + "\n")
    return out / FILE


def _plain(value: Any) -> Any:
    """JSON has no NaN; a figure without a value is null."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(content: Mapping[str, Any]) -> str:
    """The results for a terminal: a line for each figure, with its standard error and what it is a mean over."""
    rows = [("task", "figure", "value", "+-", "of", "")]
    for label, task in content["tasks"].items():
        counts = task["counts"]
        of = f"{counts['judged']} answers" if "judged" in counts else f"{counts['rows']} rows"
        told = ", ".join(f"{count} {name}" for name, count in counts.items() if count and name not in _QUIET)
        for name, value in task["figures"].items():
            if not name.endswith("_stderr"):
                rows.append((label, name, _number(value), _number(task["figures"].get(f"{name}_stderr"), ""), of, told))
                label = of = told = ""
    for label, found in (content.get("lm_eval") or {}).get("results", {}).items():
        shown, samples = f"lm_eval {label}", content["lm_eval"]["n-samples"].get(label, {}).get("effective")
        for name, value in found.items():
            metric, _, kind = name.partition(",")
            if kind and isinstance(value, int | float) and not metric.endswith("_stderr"):
                error = found.get(f"{metric}_stderr,{kind}")
                error = error if isinstance(error, int | float) else None
                rows.append((shown, name, _number(value), _number(error, ""), f"{samples} rows" if samples else "", ""))
                shown = ""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _number(value: float | None, missing: str = "-") -> str:
    if value is None or not math.isfinite(value):
        return missing
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"
