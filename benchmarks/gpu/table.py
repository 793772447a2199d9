"""The results of all parts: a table to read, and one JSON object."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu.report import NOT_MEASURED, WRONG, Row
from gpu.runner import Result


def lines(results: Sequence[Result]) -> list[str]:
    """The table: a head for each part, then its rows."""
    width = max((len(row.what) for result in results for row in result.rows), default=0)
    shown = []
    for result in results:
        shown.append(f"{result.part.name}   {result.end}, {result.seconds:.0f} s")
        shown += [f"  {row.verdict:<12}  {row.what:<{width}}  {_found(row)}" for row in result.rows]
    return shown


def _found(row: Row) -> str:
    found = f"{row.found:.4g}" if isinstance(row.found, float) else str(row.found)
    allowed = "" if row.allowed is None else f" (at most {row.allowed:g})"
    return f"{found} {row.unit}".rstrip() + allowed


def summary(results: Sequence[Result], about: dict[str, Any]) -> dict[str, Any]:
    """What `check.json` holds. `ok`: nothing that ran is wrong."""
    rows = [(result.part.name, row) for result in results for row in result.rows]
    parts = {
        result.part.name: {
            "end": result.end,
            "seconds": result.seconds,
            "log": result.log,
            "rows": [asdict(row) for row in result.rows],
        }
        for result in results
    }
    return {
        "benchmark": "gpu/check",
        **about,
        "ok": not any(result.wrong for result in results),
        "rows": len(rows),
        "wrong": [f"{part}: {row.what}" for part, row in rows if row.verdict == WRONG],
        "not_measured": sum(row.verdict == NOT_MEASURED for _, row in rows),
        "parts": parts,
    }


def write(folder: Path, found: dict[str, Any]) -> None:
    """`check.json`, complete or not at all."""
    made = folder / ".check.json.incomplete"
    made.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    made.replace(folder / "check.json")
