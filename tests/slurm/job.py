"""A submitted job, and what its run has written so far."""

from __future__ import annotations

import time
from pathlib import Path

from fusemega.training.records import COSTS, METRICS_FILE, read_metrics
from tests.slurm.cluster import ENDED, Cluster

ROOT = Path(__file__).resolve().parents[2]
LONG = 1800.0  # seconds: machines that run tests may have little to spare


class Job:
    """A job of the test cluster.

    Args:
        number: its id.
        folder: where it was submitted; its log lies there, and its run in `out`.
    """

    def __init__(self, cluster: Cluster, number: str, folder: Path) -> None:
        self.cluster, self.number, self.folder = cluster, number, folder
        self.out = folder / "out"

    @property
    def log(self) -> str:
        path = self.folder / f"log-{self.number}"
        return path.read_text(errors="replace") if path.exists() else ""

    def tries(self, folder: Path | None = None) -> list[list[str]]:
        """Lines of jobs.tsv that are this job's: start or end, time, job, restart, progress, nodes or verdict."""
        path = (folder or self.out / "slurm") / "jobs.tsv"
        lines = [line.split("\t") for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if line[2] == self.number]

    def wait_rows(self, count: int) -> None:
        """Waits until the run has done that many updates."""
        self.wait(lambda: self._rows() >= count, f"{count} rows")

    def wait(self, condition, what: str) -> None:  # type: ignore[no-untyped-def]
        """Waits until the condition holds; the log is in the message where it does not, or the job has ended."""
        try:
            self.cluster.wait(lambda: condition() or self.cluster.field(self.number, "JobState") in ENDED, what, LONG)
        except AssertionError as error:
            raise AssertionError(f"{self.log[-6000:]}\n{error}") from None
        assert condition(), f"ended before: {what}\n{self.log[-6000:]}"

    def ended(self, state: str = "COMPLETED") -> None:
        """Waits for the job's end, which must be in this state."""
        found = self.cluster.wait_state(self.number, seconds=LONG)
        assert found == state, f"{found}\n{self.log[-6000:]}"
        time.sleep(0.2)  # the last lines of the log

    def curve(self) -> list[dict[str, float]]:
        return curve(self.out)

    def _rows(self) -> int:
        path = self.out / METRICS_FILE
        return path.read_bytes().count(b"\n") if path.exists() else 0


def curve(folder: Path) -> list[dict[str, float]]:
    """What a run computed, without what it cost."""
    return [{name: value for name, value in row.items() if name not in COSTS} for row in read_metrics(folder)]
