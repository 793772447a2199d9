"""What the ranks of a run do, from the files that they leave in `output_dir/monitor`; and which of them hangs.

Needs no torch and no process group: `read_ranks` and `find_hang` serve a run in its own log, and anyone who looks at
its folder from outside.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fusemega.errors import UserError
from fusemega.files.json_files import read_json

MONITOR = "monitor"  # the folder in output_dir
_FILE = re.compile(r"rank-(\d{5,})\.json")
_FILE_BYTES = 1 << 20
SILENT_SECONDS, HANG_SECONDS = 30.0, 300.0


@dataclass(frozen=True)
class RankState:
    """What one rank has last written about itself. Times are seconds since the epoch, by its own node's clock.

    Attributes:
        rank, world_size, host, pid, device: who it is.
        started: when it began to write.
        time: when it wrote this.
        beats: how often it has written.
        iteration, train_iters: updates done, and those of the run; 0 while that is not known.
        phase: what it does: starting, loading, step, waiting for data, forward and backward, optimizer, between steps,
            evaluation, save, export.
        since: when that phase began.
        detail: more about the phase; None where there is no more to say.
        moved: when its main thread was last seen at another place than before.
        collective: the collective in which it waits for others, as seen when it had not moved for a while; "": none.
        code: where in fusemega or megatron-core it was then; "" while it moves.
        ended: None while it runs; else "finished", "stopped" (by a signal, after a checkpoint) or "failed: REASON".
        device_state: the newest readings of its device, by NVML's or psutil's names.
        device_worst: the largest of these readings so far.
        device_errors: what went wrong with the device, a line each.
    """

    rank: int
    world_size: int
    host: str
    pid: int
    device: str
    started: float
    time: float
    beats: int
    iteration: int
    train_iters: int
    phase: str
    since: float
    detail: str | None
    moved: float
    collective: str
    code: str
    ended: str | None
    device_state: dict[str, float]
    device_worst: dict[str, float]
    device_errors: list[str]

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    @property
    def name(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    @property
    def doing(self) -> str:
        """In words: the phase, the iteration, and where in the code, as far as known."""
        words = self.phase if self.detail is None else f"{self.phase} ({self.detail})"
        if self.train_iters and self.phase not in ("loading", "starting"):
            words += f" after iteration {self.iteration}"
        return f"{words}, at {self.code}" if self.code else words

    @property
    def standing(self) -> float:
        """Seconds for which it had not moved when it wrote this."""
        return self.time - self.moved

    def age(self) -> float:
        """Seconds since it wrote this, if this node's clock and its own agree."""
        return time.time() - self.time


@dataclass(frozen=True)
class Hang:
    """Ranks that hold up the others.

    Attributes:
        kind: "silent" (writes no heartbeat: stopped, lost, or kept busy by a library), "stuck" (writes, but does not
            move) or "waiting" (all wait for one another).
        ranks: the ranks concerned.
        line: one line that names them, where they are, and who waits for them.
    """

    kind: str
    ranks: tuple[RankState, ...]
    line: str


def rank_file(folder: Path, rank: int) -> Path:
    """The file of a rank below `output_dir`."""
    return folder / MONITOR / f"rank-{rank:05d}.json"


def read_rank(path: Path) -> RankState | None:
    """What a rank wrote; None if there is no such file, or it is none of a rank."""
    try:
        found = read_json(path, limit=_FILE_BYTES)
        return RankState(**_checked(found))
    except (UserError, TypeError, ValueError):
        return None


def read_ranks(output_dir: str | Path) -> list[RankState]:
    """The ranks of the newest start of the run in this folder, by rank; [] if there are none.

    Example:
        >>> read_ranks("/nowhere")
        []
    """
    folder = Path(output_dir) / MONITOR
    try:
        paths = sorted(path for path in folder.iterdir() if _FILE.fullmatch(path.name))
    except OSError:
        return []
    states = [state for path in paths if (state := read_rank(path)) is not None]
    states.sort(key=lambda state: state.rank)
    if states and states[0].rank == 0:  # of an earlier start with more ranks, which left files behind
        states = [state for state in states if state.rank < states[0].world_size]
    return states


def is_monitor_folder(folder: Path) -> bool:
    """Whether a folder holds nothing but what ranks write about themselves."""
    try:
        return all(_FILE.fullmatch(path.name.removeprefix(".").removesuffix(".tmp")) for path in folder.iterdir())
    except OSError:
        return False


def find_hang(
    states: Sequence[RankState],
    silent_after: float = SILENT_SECONDS,
    hang_after: float = HANG_SECONDS,
    age: Callable[[RankState], float] = RankState.age,
) -> Hang | None:
    """The ranks that hold up a run; None where none does, as far as can be seen.

    Args:
        states: all ranks.
        silent_after: seconds without a heartbeat, after which a rank counts as silent.
        hang_after: seconds without any movement of any rank, after which the run counts as hanging.
        age: seconds since a rank wrote; a watcher that reads repeatedly need not compare the clocks of nodes.
    """
    running = [state for state in states if state.ended is None]
    if silent := [state for state in running if age(state) > silent_after]:
        others = [state for state in running if state not in silent]
        told = "; ".join(
            f"{state.name} has written no heartbeat for {age(state):.0f} s, and was last in {state.doing}"
            for state in silent[:3]
        )
        more = f"; and {len(silent) - 3} more: ranks {numbers(silent[3:])}" if len(silent) > 3 else ""
        why = "stopped (SIGSTOP, a debugger), on a lost node, or kept busy by a library"
        return Hang("silent", tuple(silent), f"{told}{more}: {why}{_waiting(others)}")
    if not running or any(state.standing + age(state) < hang_after for state in running):
        return None
    quiet = min(state.standing + age(state) for state in running)
    stuck = [state for state in running if not state.collective]
    waiting = [state for state in running if state.collective]
    begun = f"no rank has moved for {quiet:.0f} s"
    if stuck:
        told = "; ".join(f"{state.name} is in {state.doing}" for state in stuck[:3])
        more = f"; and {len(stuck) - 3} more: ranks {numbers(stuck[3:])}" if len(stuck) > 3 else ""
        return Hang("stuck", tuple(stuck), f"{begun}: {told}{more}{_waiting(waiting)}")
    places: dict[tuple[str, str], list[RankState]] = {}
    for state in waiting:
        places.setdefault((state.collective, state.code), []).append(state)
    groups = sorted(places.items(), key=lambda item: (len(item[1]), min(state.iteration for state in item[1])))
    if len(groups) == 1:
        (collective, code), _ = groups[0]
        line = f"{begun}: all wait in {collective}, at {code}: the network between them, or a rank of another group"
        return Hang("waiting", tuple(waiting), line)
    told = "; ".join(f"ranks {numbers(group)} in {where[0]}, at {where[1]}" for where, group in groups[:4])
    return Hang("waiting", tuple(groups[0][1]), f"{begun}: they wait for one another: {told}")


def numbers(states: Iterable[RankState]) -> str:
    """Their numbers in few words: 0-2, 5."""
    out: list[list[int]] = []
    for rank in sorted(state.rank for state in states):
        if out and out[-1][1] == rank - 1:
            out[-1][1] = rank
        else:
            out.append([rank, rank])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in out]
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more ranges" if len(shown) > 12 else "")


def _waiting(others: Sequence[RankState]) -> str:
    if not others:
        return ""
    known = [state for state in others if state.collective]
    where = f" in {known[0].collective}, at {known[0].code}" if known else ""
    return f"; waiting: rank{'s' if len(others) > 1 else ''} {numbers(others)}{where}"


def _checked(found: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `RankState`, of the right kinds; others are left out."""
    kinds = {"int": (int,), "str": (str,), "float": (int, float), "str | None": (str, type(None))}
    out = {}
    for field in fields(RankState):
        value, wanted = found.get(field.name), str(field.type)
        if wanted.startswith("dict"):
            good = isinstance(value, dict) and all(type(x) in (int, float) for x in value.values())
        elif wanted.startswith("list"):
            good = isinstance(value, list) and all(isinstance(x, str) for x in value)
        else:
            good = type(value) in kinds[wanted]
        if not good:
            raise ValueError(f"{field.name} is {value!r}")
        out[field.name] = value
    return out
