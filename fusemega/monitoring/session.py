"""The threads of one rank while it trains: its heartbeat and, on the first two ranks, the watch."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fusemega.monitoring.heartbeat import Heartbeat
from fusemega.monitoring.ranks import MONITOR, RankState, find_hang, is_monitor_folder, rank_file, read_ranks
from fusemega.monitoring.settings import MonitoringSection
from fusemega.monitoring.watch import Watch
from fusemega.runtime.activity import current, phase_of, place_of
from fusemega.runtime.console import warn_from_here
from fusemega.runtime.meeting import is_echo, launch_folder
from fusemega.runtime.parallel import World
from fusemega.runtime.together import on_main

_heartbeat: Heartbeat | None = None
_watch: Watch | None = None
_how = "finished"


def all_states() -> list[RankState]:
    """On the main rank: what all ranks have last written, as far as they were seen; else, or without heartbeats: []."""
    return [] if _watch is None else _watch.states()


def note_stop() -> None:
    """Says that this run ends before its last iteration, in good order: its heartbeat tells."""
    global _how
    _how = "stopped"


def own_heartbeat() -> Heartbeat | None:
    """The heartbeat of this process, while it is in `watched`."""
    return _heartbeat


@contextmanager
def watched(output_dir: Path, settings: MonitoringSection, world: World, is_kept: Callable[[], bool]) -> Iterator[None]:
    """Writes heartbeats into `output_dir/monitor` and watches those of others, while the block runs. Collective.

    Args:
        output_dir: the run's folder, which this run owns.
        settings: how often, and what counts as a hang.
        world: this process's place.
        is_kept: asked where the block fails: whether the folder is a run's; if not, no trace is left in it.
    """
    global _heartbeat, _watch, _how
    if settings.heartbeat_seconds is None:
        yield
        return
    on_main(world, lambda: _remove_older(output_dir))
    seconds = settings.heartbeat_seconds
    heartbeat = Heartbeat(output_dir, world.rank, world.world_size, str(world.device), seconds)
    seen = range(world.world_size) if world.is_main else range(1)
    named = launch_folder() is not None  # the launcher sees the states of its processes
    # Said before the timeout: that of NCCL ends the process, and nobody could say it afterwards.
    hang_after = min(settings.hang_seconds, 0.8 * world.timeout.total_seconds())
    watch = Watch(output_dir, seen, seconds, settings.silent_seconds, hang_after, named)
    heartbeat.start()
    if world.rank < 2:
        watch.start()
    _heartbeat, _watch, _how = heartbeat, watch if world.is_main else None, "finished"
    try:
        yield
    except BaseException as error:
        _heartbeat = _watch = None
        if world.rank < 2:
            watch.end()
        if isinstance(error, Exception) and _is_timeout(error):
            _tell_timeout(error, output_dir, world, settings)
        if is_kept():
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            heartbeat.end(f"failed: {reason[:500]}")
        else:
            heartbeat.remove()
        raise
    _heartbeat = _watch = None
    if world.rank < 2:
        watch.end()
    heartbeat.end(_how)


def _is_timeout(error: Exception) -> bool:
    return is_echo(error) and re.search("timed? ?out", str(error), re.IGNORECASE) is not None


def _tell_timeout(error: Exception, output_dir: Path, world: World, settings: MonitoringSection) -> None:
    """Names the operation that took too long, and the ranks that did not come to it; once, from the first rank here."""
    states = read_ranks(output_dir)
    absent = find_hang(states, settings.silent_seconds, hang_after=settings.silent_seconds)
    gone = [] if absent is None else [state.rank for state in absent.ranks]
    if world.rank != min((state.rank for state in states if state.rank not in gone), default=world.rank):
        return
    at = place_of(error)
    why = "no heartbeat says which rank did not come" if absent is None else absent.line
    warn_from_here(
        f"rank {world.rank}: {at.collective or 'a collective'}, at {at.code}, in {phase_of(error)} after iteration "
        f"{current().iteration}, did not end within {world.timeout.total_seconds() / 60:g} minutes "
        f"(monitoring.collective_timeout_minutes): {why}"
    )


def _remove_older(output_dir: Path) -> None:
    """Removes what the ranks of an earlier start have left; nothing else."""
    for state in read_ranks(output_dir):
        with contextlib.suppress(OSError):
            rank_file(output_dir, state.rank).unlink()


def holds_more(output_dir: Path, besides: str) -> bool:
    """Whether a folder holds anything but `besides` and what ranks write about themselves before there is a run."""
    found = (path for path in output_dir.iterdir() if path.name != besides)
    return any(path.name != MONITOR or not is_monitor_folder(path) for path in found)
