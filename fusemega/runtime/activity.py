"""What this process is doing, for those who watch it: its main thread says so here, and other threads read it.

Saying so costs about a microsecond, so it may be done in every step. Nothing here knows who reads.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import CodeType, FrameType, TracebackType

STARTING, LOADING, STEP, BETWEEN = "starting", "loading", "step", "between steps"
DATA, COMPUTE, OPTIMIZER = "waiting for data", "forward and backward", "optimizer"
EVALUATION, SAVE, EXPORT = "evaluation", "save", "export"

# Where Python waits for other ranks: torch's collectives, and code that waits for their handles.
_COLLECTIVES = "torch/distributed/distributed_c10d.py"
_WAITS = (
    "megatron/core/pipeline_parallel/p2p_communication.py",
    "megatron/core/distributed/param_and_grad_buffer.py",
    "fusemega/runtime/parallel.py",
)
_NAMES = {"_coalescing_manager": "coalesced collectives"}
_ROOT = __file__.removesuffix("runtime/activity.py")
_MEGATRON = "/megatron/core/"


@dataclass(frozen=True)
class Level:
    """One thing that is being done, inside others.

    Attributes:
        name: what; a phase of this module, or words of `console.phase`.
        is_phase: which of the two.
        since: seconds since the epoch.
    """

    name: str
    is_phase: bool
    since: float


@dataclass(frozen=True)
class Activity:
    """What the main thread is doing.

    Attributes:
        phase: one of this module's phases.
        since: when it began, seconds since the epoch.
        detail: more about it, where something was said.
        moves: how often one thing gave way to another; it stands still where the process does.
        iteration, train_iters: updates done, and those of the run; 0 where there is none.
    """

    phase: str
    since: float
    detail: str | None
    moves: int
    iteration: int
    train_iters: int


@dataclass(frozen=True)
class CodePlace:
    """Where a thread is in the code.

    Attributes:
        collective: the collective that it waits in; "" where it computes, or waits for something else.
        code: file, line and function of fusemega or megatron-core; "" if it is in neither.
        signature: differs where any line of the stack differs.
    """

    collective: str
    code: str
    signature: int


_levels: tuple[Level, ...] = (Level(STARTING, True, time.time()),)  # replaced, so that other threads read a whole one
_moves = 0
_progress = (0, 0)
_left_by = (0, "")  # the last error that ended a phase (its id, so that it can be freed), and the innermost such phase


class doing:  # noqa: N801  (reads as a statement, as `contextlib.suppress` does)
    """While entered, the main thread is in this phase. In another thread nothing happens.

    Example:
        >>> with doing(OPTIMIZER):
        ...     current().phase
        'optimizer'
    """

    __slots__ = ("_is_phase", "_name", "_outside")

    def __init__(self, name: str, is_phase: bool = True) -> None:
        self._name, self._is_phase = name, is_phase
        self._outside: tuple[Level, ...] | None = None

    def __enter__(self) -> None:
        global _levels, _moves
        if threading.get_ident() == threading.main_thread().ident:
            self._outside = _levels
            _levels = (*_levels, Level(self._name, self._is_phase, time.time()))
            _moves += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _levels, _moves, _left_by
        if self._outside is not None:
            if error is not None and _left_by[0] != id(error):
                _left_by = id(error), current().phase
            _levels = self._outside
            _moves += 1


def reached(iteration: int, train_iters: int) -> None:
    """Says how many updates are done, and how many the run has."""
    global _progress
    _progress = (iteration, train_iters)


def current() -> Activity:
    """What the main thread is doing; for any thread."""
    levels = _levels
    at = max(i for i, level in enumerate(levels) if level.is_phase)
    detail = levels[-1].name if len(levels) > at + 1 else None
    name = BETWEEN if at == 0 and _progress[0] else levels[at].name  # updates are done, so it no longer starts
    return Activity(name, levels[at].since, detail, _moves, *_progress)


def phase_of(error: BaseException) -> str:
    """The phase in which an error was raised that has just come up to here."""
    return _left_by[1] if _left_by[0] == id(error) else current().phase


def place() -> CodePlace:
    """Where the main thread is; for other threads. Takes some tens of microseconds."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    frames = []
    while frame is not None:
        frames.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return _place(frames)


def place_of(error: BaseException) -> CodePlace:
    """Where an error was raised."""
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append((trace.tb_frame.f_code, trace.tb_lineno))
        trace = trace.tb_next
    return _place(frames[::-1])


def _short(file: str) -> str:
    """A file of fusemega or megatron-core from its package on; "" for another, and for this one."""
    if file.startswith(_ROOT) and file != __file__:
        return f"fusemega/{file.removeprefix(_ROOT)}"
    return f"megatron/core/{file.rpartition(_MEGATRON)[2]}" if _MEGATRON in file else ""


def _place(frames: Sequence[tuple[CodeType, int]]) -> CodePlace:
    """`frames`: the innermost first."""
    collective, code, waits = "", "", False
    for of, line in frames:
        if of.co_filename.endswith(_COLLECTIVES):
            collective = _NAMES.get(of.co_name, of.co_name)  # of torch's outermost function: what the caller has called
        if file := _short(of.co_filename):
            code, waits = f"{file}:{line} ({of.co_name})", file in _WAITS
            break
    signature = hash(tuple((id(of), line) for of, line in frames))
    return CodePlace(collective or ("a wait for other ranks" if waits else ""), code, signature)
