"""A checkpoint that is whole, and still ends every start that loads it: the run then goes on from the one before it.

    checkpoints/loading.json      there while a checkpoint is loaded, and after a start that this has ended

Once: if the one before does not load either, the cause lies elsewhere, and the run is refused. Nothing is removed; the
tracker is set to the checkpoint that was loaded, and the other one stays until the run gets to its iteration again.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from fusemega.errors import Retryable, UserError
from fusemega.files.json_files import read_json
from fusemega.files.output import write_durably
from fusemega.runtime.console import warn
from fusemega.runtime.meeting import is_echo

if TYPE_CHECKING:
    from fusemega.runtime.parallel import World

LOADING = "loading.json"
STARTS = 2  # that ended while they loaded, without an error: something from outside may have ended one


@dataclass(frozen=True)
class Loading:
    """What is known of the last loads that did not come to an end.

    Attributes:
        checkpoint: name of the folder.
        starts: how many starts in a row began to load it.
        error: what one of them raised.
        instead_of: the folder that did not load before; the one from which this one takes over.
    """

    checkpoint: str
    starts: int = 1
    error: str | None = None
    instead_of: str | None = None

    @classmethod
    def read(cls, root: Path) -> Loading | None:
        """The note in the folder of checkpoints; None: all that was loaded came to an end.

        Raises:
            UserError: it is none.
        """
        path = root / LOADING
        if not path.is_file():
            return None
        found = read_json(path)
        texts = [found.get(key) for key in ("error", "instead_of")]
        if (
            found.keys() != {"checkpoint", "starts", "error", "instead_of"}
            or not re.fullmatch(r"iter_\d{7,18}", str(found["checkpoint"]))
            or type(found["starts"]) is not int
            or not all(text is None or isinstance(text, str) for text in texts)
        ):
            raise UserError(f"{path}: not a note of loading; remove it to load the newest checkpoint")
        return cls(**found)

    def write(self, root: Path) -> None:
        """Replaces the note."""
        write_durably(root / LOADING, json.dumps(asdict(self)))

    @property
    def failed(self) -> str | None:
        """Why this checkpoint is not to be loaded again; None if it may be."""
        if self.error is not None:
            return f"{self.checkpoint}: could not be loaded ({self.error})"
        if self.starts >= STARTS:
            return f"{self.checkpoint}: {self.starts} starts in a row ended while they loaded it"
        return None


def without_failed(root: Path, folders: list[Path]) -> tuple[str | None, list[Path]]:
    """Leaves out a checkpoint that does not load, and later ones, if there is one before it.

    Args:
        folders: checkpoints in the order in which they are tried.

    Returns:
        What is wrong with it, and the folders that are left; none if that one's predecessor did not load either.

    Raises:
        UserError: the note is damaged.
    """
    note = Loading.read(root)
    if note is None or not folders or folders[0].name not in (note.checkpoint, note.instead_of):
        return None, folders
    bad, why = note.checkpoint, note.failed
    if note.instead_of is not None:
        if why is not None:
            return f"{why}; neither could {note.instead_of}; remove {root / LOADING} to try again", []
        bad, why = note.instead_of, f"{note.instead_of}: could not be loaded"
    earlier = [folder for folder in folders if _iteration(folder.name) < _iteration(bad)]
    return (why, earlier) if why is not None and earlier else (None, folders)


@contextlib.contextmanager
def loading(folder: Path, tracker: str, world: World) -> Iterator[None]:
    """Around the load of a checkpoint. Collective.

    Args:
        folder: the checkpoint, from `find_checkpoint`.
        tracker: name of the tracker's file.

    Raises:
        Retryable: the load failed, and there is another way the next time.
    """
    root, note, before = folder.parent, None, None
    if world.is_main:
        before = Loading.read(root)
        note = _next(before, folder)
        note.write(root)
    world.barrier()  # before a rank adds its error to the note
    try:
        with _ended_by_term():
            yield
    except SystemExit:  # told to end: not this checkpoint's fault
        if world.is_main:
            _restore(root, before)
        raise
    except Exception as error:
        if is_echo(error):
            raise
        mine = note or Loading.read(root) or Loading(folder.name)
        if mine.instead_of is None and not _has_earlier(folder):
            if world.is_main:  # nothing to go back to: the next start tries the same again
                _restore(root, before)
            raise
        Loading(mine.checkpoint, mine.starts, str(error)[:2000], mine.instead_of).write(root)
        if mine.instead_of is None:
            raise Retryable(f"{error}; the next start takes the checkpoint before it") from error
        raise
    world.barrier()
    if world.is_main:
        assert note is not None
        if note.instead_of is not None:
            write_durably(root / tracker, str(_iteration(folder.name)))
            warn(f"{root / tracker}: names {folder.name} from now on; {note.instead_of} stays as it is")
        (root / LOADING).unlink(missing_ok=True)


def _has_earlier(folder: Path) -> bool:
    others = (path for path in folder.parent.glob("iter_*") if path.suffix == "")
    return any(_iteration(path.name) < _iteration(folder.name) for path in others)


def _iteration(name: str) -> int:
    return int(name.removeprefix("iter_"))


def _next(before: Loading | None, folder: Path) -> Loading:
    if before is None:
        return Loading(folder.name)
    if before.checkpoint == folder.name:
        return Loading(folder.name, before.starts + 1, None, before.instead_of)
    return Loading(folder.name, instead_of=before.checkpoint if before.failed else None)


def _restore(root: Path, before: Loading | None) -> None:
    if before is None:
        (root / LOADING).unlink(missing_ok=True)
    else:
        before.write(root)


@contextlib.contextmanager
def _ended_by_term() -> Iterator[None]:
    """A TERM raises SystemExit where it would have ended the process without a word."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
