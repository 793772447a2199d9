"""The journal of a merge: one line for each finished job, written after its weights are on disk.

The line has the hash of the weights. If a resumed merge finds other bytes, it merges them again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusemega.errors import UserError
from fusemega.files.json_files import read_lines
from fusemega.files.output import write_durably
from fusemega.files.remembered import traces
from fusemega.merge.plan import MergePlan
from fusemega.text.vocabulary_files import FILES

JOURNAL = "merge_journal.jsonl"


@dataclass(frozen=True)
class Done:
    """A finished job.

    Attributes:
        tensors: the report's entry for each tensor.
        hash: XXH3-128 of their bytes, one after the other.
    """

    tensors: list[dict[str, Any]]
    hash: str


class Journal:
    """The journal of the folder a merge is being written to.

    Args:
        folder: that folder; it exists.
        plan: the plan of the merge.
        resume: continue the journal that is there.

    Attributes:
        done: name of a finished job's first tensor -> the job.

    Raises:
        UserError: the journal is of another merge, or damaged.
    """

    def __init__(self, folder: Path, plan: MergePlan, resume: bool) -> None:
        self.path = folder / JOURNAL
        self.done: dict[str, Done] = {}
        fingerprint = _fingerprint(plan)
        if resume:
            lines, _ = read_lines(self.path, finite=False)  # the line that was being written is left out
            if not lines or lines[0][1] != json.loads(json.dumps(fingerprint)):
                raise UserError(
                    f"{folder}: left by a merge of other models or settings; give those, or delete it and leave "
                    f"--resume out"
                )
            for number, entry in lines[1:]:
                finished = _finished(entry, plan)
                if finished is None:
                    raise UserError(f"{self.path}:{number}: not a finished job; delete {folder} and leave --resume out")
                self.done |= finished
        # Only complete lines, in one write: after a kill at any moment the journal can be continued.
        kept = [json.dumps(fingerprint), *(_line(name, done) for name, done in self.done.items())]
        write_durably(self.path, "\n".join(kept) + "\n")
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  (open as long as the merge runs)

    def add(self, jobs: list[tuple[str, Done]]) -> None:
        """Records jobs whose weights are on disk; their lines are on disk at the end. The last line of a job counts."""
        for name, done in jobs:
            self._file.write(_line(name, done) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _finished(entry: Any, plan: MergePlan) -> dict[str, Done] | None:
    """The job of a line, by name; None if the line is not a finished job of the plan."""
    if not isinstance(entry, dict) or entry.keys() != {"job", "tensors", "hash"}:
        return None
    name, rows, digest = entry["job"], entry["tensors"], entry["hash"]
    job = next((job for job in plan.jobs if job.tensors[0].name == name), None)
    told = [row.get("tensor") if isinstance(row, dict) else None for row in (rows if isinstance(rows, list) else [])]
    if job is None or told != [spec.name for spec in job.tensors]:
        return None
    return {name: Done(rows, digest)} if isinstance(digest, str) and re.fullmatch("[0-9a-f]{32}", digest) else None


def _line(job: str, done: Done) -> str:
    return json.dumps({"job": job, **asdict(done)})


def _fingerprint(plan: MergePlan) -> dict[str, Any]:
    """Everything that the output's bits depend on: settings, and the inputs by path, size and times of change."""
    named = (path for folder in plan.folders for path in [*folder.files(), *(folder.path / name for name in FILES)])
    files = traces([path for path in named if path.exists()])
    vocabulary = plan.vocabulary
    decides = hashlib.blake2b(digest_size=16)
    rows_of = (vocabulary.rows, vocabulary.donor, vocabulary.added, plan.template)
    for part in (plan.jobs, plan.shards, plan.config, *rows_of):
        decides.update(repr(part).encode())
    for rows in vocabulary.maps:
        decides.update(b"same" if rows is None else rows.tobytes())
    return {"method": plan.method.name, "decides": decides.hexdigest(), "files": files}
