"""Where the ranks of a preflight meet: a key-value store with a deadline, so that missing ranks are named."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fusemega.errors import Retryable, UserError

_POLL_SECONDS = 0.2


class Absent(Exception):
    """Ranks have not come in time.

    Attributes:
        ranks: which.
    """

    def __init__(self, ranks: Sequence[int], seconds: float) -> None:
        super().__init__(f"no answer from rank(s) {', '.join(map(str, ranks))} within {seconds:.0f} s")
        self.ranks = list(ranks)


class Meeting:
    """The store of all ranks. Nobody waits longer than `seconds` for a key.

    Args:
        rank, world_size: this process's place.
        seconds: the deadline, from now on.

    Attributes:
        store: torch's store, for a process group.

    Raises:
        Retryable: rank 0's machine does not answer.
    """

    def __init__(self, rank: int, world_size: int, seconds: float) -> None:
        self.rank, self.world_size, self.seconds = rank, world_size, seconds
        self._end = time.monotonic() + seconds
        self.store: Any = dist.HashStore() if world_size == 1 else _connected(rank, seconds)

    def put(self, what: str, value: object) -> None:
        """Says something under this rank's name."""
        self.store.set(f"{what}/{self.rank}", json.dumps(value))

    def all(self, what: str, ranks: Sequence[int] | None = None, least: float = 0.0) -> dict[int, Any]:
        """What ranks have said, by rank, once all have.

        Args:
            ranks: which; None: all.
            least: seconds that are waited even if the deadline is near.

        Raises:
            Absent: some have said nothing; `said` gives what the others said.
        """
        wanted = range(self.world_size) if ranks is None else ranks
        end = max(self._end, time.monotonic() + least)
        while missing := [rank for rank in wanted if not self.store.check([f"{what}/{rank}"])]:
            if time.monotonic() > end:
                raise Absent(missing, self.seconds)
            time.sleep(_POLL_SECONDS)
        return {rank: json.loads(self.store.get(f"{what}/{rank}")) for rank in wanted}

    def said(self, what: str) -> dict[int, Any]:
        """What ranks have said so far, by rank."""
        there = [rank for rank in range(self.world_size) if self.store.check([f"{what}/{rank}"])]
        return {rank: json.loads(self.store.get(f"{what}/{rank}")) for rank in there}

    def again(self) -> None:
        """The deadline begins anew."""
        self._end = time.monotonic() + self.seconds


def job_nodes() -> list[str]:
    """The nodes of this Slurm job step; [] outside of Slurm."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        return []
    try:
        command = ["scontrol", "show", "hostnames", nodes]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return []


def _connected(rank: int, seconds: float) -> Any:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # a launcher has the store
    try:
        store = dist.TCPStore(
            address,
            port,
            is_master=rank == 0 and not by_agent,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        if "listen" in reason:
            raise UserError(f"rank 0 cannot open the store at port {port}: another process has it ({reason})") from None
        raise Retryable(
            f"rank {rank}: the store of rank 0 at {address}:{port} did not answer within {seconds:.0f} s ({reason})"
        ) from None
    return dist.PrefixStore("fusemega/preflight", store)
