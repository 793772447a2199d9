"""Signals that stop a run: recorded at once, handled between steps by all ranks together."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

from fusemega.runtime.console import say
from fusemega.runtime.meeting import is_heard, launch_folder
from fusemega.runtime.parallel import World

# TERM: preemption, scancel, torchrun. USR1: the batch script's warning of the time limit. INT: Ctrl-C.
# HUP: the terminal is gone.
_LAUNCHERS = {"TORCHELASTIC_RUN_ID", "SLURM_STEP_ID"}  # what their processes find in the environment
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class StopSignals:
    """While entered, the first such signal only leaves a note; a second one acts as it would have without this class.

    A HUP or INT that is ignored on entry stays ignored: `nohup` does that to HUP, and a shell to INT of its background
    jobs. TERM and USR1 are always heard: a batch script may ignore USR1 to live on itself, and its trainers inherit
    that (slurm/lib.sh). Under a launcher (this package's, torchrun, Slurm) second signals only leave a note as well: it
    passes on what the whole job gets, so they come in pairs, and it kills its ranks if somebody insists.

    Args:
        world: this process's place.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._noted = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._previous = {number: signal.signal(number, self._note) for number in STOPPING if is_heard(number)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self, also: int = 0) -> int:
        """The number of a signal that any rank has noted, the same on every rank; 0: none. Collective.

        Args:
            also: one for which this rank has another reason.
        """
        return self._world.largest(self._noted or also)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if launch_folder() is None and not _LAUNCHERS & os.environ.keys():
            signal.signal(number, self._previous[number])
        elif self._noted:
            return
        self._noted = number
        say(f"{signal.Signals(number).name}: stopping after this step, with a checkpoint")
