"""What of an interrupted merge is whole: a line a finished job, written after its weights are on the disk."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, TypeGuard

from fusemega.errors import UserError
from fusemega.files.json_files import read_lines
from fusemega.files.output import write_durably
from fusemega.merge.plan import MergePlan
from fusemega.text.vocabulary_files import FILES

JOURNAL = "merge_journal.jsonl"


class Journal:
    """The journal of the folder a merge is being written to.

    Args:
        folder: that folder; it exists.
        plan: of the merge.
        resume: go on with the journal that is there.

    Attributes:
        done: name of each finished job's first tensor -> what was reported of the job's tensors.

    Raises:
        UserError: the journal is of another merge.
    """

    def __init__(self, folder: Path, plan: MergePlan, resume: bool) -> None:
        self.path = folder / JOURNAL
        self.done: dict[str, list[dict[str, Any]]] = {}
        fingerprint = _fingerprint(plan)
        if resume:
            lines, _ = read_lines(self.path, finite=False)  # the line that was being written is left out
            if not lines or lines[0][1] != json.loads(json.dumps(fingerprint)):
                raise UserError(
                    f"{folder}: left by a merge of other models or settings; give those, or delete it and leave "
                    f"--resume out"
                )
            for number, entry in lines[1:]:
                job, tensors = (entry.get("job"), entry.get("tensors")) if isinstance(entry, dict) else (None, None)
                if not isinstance(job, str) or not _are_rows(tensors):
                    raise UserError(f"{self.path}:{number}: not a finished job; delete {folder} and leave --resume out")
                self.done[job] = tensors
        # Whole lines only, and in one step: a kill at any moment leaves a journal that can be gone on with.
        kept = [json.dumps(fingerprint), *(_line(name, tensors) for name, tensors in self.done.items())]
        write_durably(self.path, "\n".join(kept) + "\n")
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  (open as long as the merge runs)

    def add(self, jobs: list[tuple[str, list[dict[str, Any]]]]) -> None:
        """Jobs whose weights are on the disk; so are these lines when it returns."""
        for name, tensors in jobs:
            self._file.write(_line(name, tensors) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _are_rows(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    """Whether it is what a report says of tensors; what it says of each is read by nobody but the report."""
    rows = value if isinstance(value, list) else [None]
    return all(isinstance(row, dict) and isinstance(row.get("shape"), list) for row in rows)


def _line(job: str, tensors: list[dict[str, Any]]) -> str:
    return json.dumps({"job": job, "tensors": tensors})


def _fingerprint(plan: MergePlan) -> dict[str, Any]:
    """What decides the output's bits: settings, and the inputs by path, size and time of change."""
    files = []
    for folder in plan.folders:
        for path in [*folder.files(), *(folder.path / name for name in FILES)]:
            if path.exists():
                status = path.stat()
                files.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
    vocabulary = plan.vocabulary
    decides = hashlib.blake2b(digest_size=16)
    rows_of = (vocabulary.rows, vocabulary.donor, vocabulary.added, plan.template)
    for part in (plan.jobs, plan.shards, plan.config, *rows_of):
        decides.update(repr(part).encode())
    for rows in vocabulary.maps:
        decides.update(b"same" if rows is None else rows.tobytes())
    return {"method": plan.method.name, "decides": decides.hexdigest(), "files": files}
