"""What `training.profile` leaves in a run's folder for a report to read, without torch.

`profile/rank0.json` is the table of one rank's most expensive operations, `profile/rank0.trace.json.gz` its trace.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusemega.errors import UserError
from fusemega.files.json_files import read_json

PROFILE = "profile"
_FORMAT = "fusemega-profile-1"


@dataclass(frozen=True)
class Operation:
    """One operation, over all profiled iterations.

    Attributes:
        name: as torch calls it.
        calls: how often it ran.
        cpu_us, gpu_us: microseconds of the host and of the GPU in it, without the operations that it calls.
    """

    name: str
    calls: int
    cpu_us: float
    gpu_us: float


@dataclass(frozen=True)
class ProfileTable:
    """The most expensive operations of one rank, most expensive first.

    Attributes:
        rank: the rank that recorded them.
        start, stop: iterations [start, stop), counted from 0.
        operations: those that are listed.
        cpu_us, gpu_us: microseconds of all operations, listed or not.
    """

    rank: int
    start: int
    stop: int
    operations: list[Operation]
    cpu_us: float
    gpu_us: float

    def write(self, folder: Path) -> None:
        """Into `folder`, as `rankN.json`."""
        text = json.dumps({"format": _FORMAT, **asdict(self)}, indent=1) + "\n"
        (folder / f"rank{self.rank}.json").write_text(text, encoding="utf-8")


def read_profile(run: Path) -> list[ProfileTable]:
    """The tables in the folder of a training run, by rank; none where it was not profiled.

    Raises:
        UserError: a file there cannot be read, or is no such table.

    Example:
        >>> import tempfile
        >>> table = ProfileTable(0, 2, 4, [Operation("aten::mm", 96, 1500.0, 0.0)], 2000.0, 0.0)
        >>> with tempfile.TemporaryDirectory() as run:
        ...     (Path(run) / PROFILE).mkdir()
        ...     table.write(Path(run) / PROFILE)
        ...     read_profile(Path(run)) == [table]
        True
    """
    tables = [_read(path) for path in (run / PROFILE).glob("rank*.json")]
    return sorted(tables, key=lambda table: table.rank)


def _read(path: Path) -> ProfileTable:
    found = read_json(path)
    if found.pop("format", None) != _FORMAT:
        raise UserError(f"{path}: not a table of profiled operations ({_FORMAT})")
    rows = found.pop("operations", None)
    if not isinstance(rows, list):
        raise UserError(f"{path}: has no list of operations")
    kinds: dict[str, Any] = {"rank": int, "start": int, "stop": int, "cpu_us": float, "gpu_us": float}
    return ProfileTable(
        **_checked(path, found, kinds),
        operations=[
            Operation(**_checked(path, row, {"name": str, "calls": int, "cpu_us": float, "gpu_us": float}))
            for row in rows
        ],
    )


def _checked(path: Path, found: Any, kinds: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(found, dict) or found.keys() != kinds.keys():
        raise UserError(f"{path}: damaged: expected {', '.join(kinds)}")
    for name, kind in kinds.items():
        if type(found[name]) not in ((int, float) if kind is float else (kind,)) or (
            kind is not str and found[name] < 0
        ):
            raise UserError(f"{path}: damaged: {name} is {found[name]!r}")
    return found
