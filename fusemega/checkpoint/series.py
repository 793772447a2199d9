"""The checkpoints of a run: which of them are whole, which is the newest, which may go.

    checkpoints/
      iter_0000020/                          appears by a rename, complete: its integrity.json lists all of it
      iter_0000030.1f0a6c2e.tmp/             being written, or what a killed process left; the next save removes it
      latest_checkpointed_iteration.txt      replaced atomically, after the rename
      loading.json                           while a checkpoint is loaded, and after a load that did not end well

What is removed is provably ours: a temporary folder has a marker in it, and a checkpoint a list of its files. A process
that is killed at any point leaves the previous checkpoint whole. Damage that comes later (a lost file, a
flipped bit) is found when a run resumes, which then goes back to the newest checkpoint that is whole.
"""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusemega.checkpoint.loading import without_failed
from fusemega.errors import UserError
from fusemega.files.integrity import FILE, check_sizes, damaged_files, unlisted
from fusemega.files.json_files import read_json
from fusemega.files.opening import read_bytes
from fusemega.files.output import INSIDE
from fusemega.files.owned import drop_scratch, mark_scratch
from fusemega.runtime.console import warn

if TYPE_CHECKING:
    from fusemega.runtime.parallel import World

CHECKPOINTS = "checkpoints"

TRACKER = "latest_checkpointed_iteration.txt"
STATE = "state.json"
_TRACKER_TEMPORARY = re.compile(rf"{re.escape(TRACKER)}\.[0-9a-f]{{8}}\.tmp")
_told: set[Path] = set()  # checkpoints of which the user was told that they are kept
_NAME = re.compile(r"iter_(\d{7,})")


def checkpoint_folder(root: Path, iteration: int) -> Path:
    """Where the checkpoint after `iteration` updates lies."""
    return root / f"iter_{iteration:07d}"


def checkpoints_below(path: Path) -> Path | None:
    """Where the checkpoints of `path` lie, a run's folder or its `checkpoints`; None where it is neither."""
    for root in (path / CHECKPOINTS, path):
        if (root / TRACKER).is_file() or (root.is_dir() and _folders(root)):
            return root
    return None


def checkpoint_named(root: Path, iteration: int) -> Path:
    """The checkpoint of one iteration.

    Raises:
        UserError: there is none; says which there are.
    """
    folder = checkpoint_folder(root, iteration)
    if not folder.is_dir():
        there = ", ".join(str(int(path.name[5:])) for path in reversed(_folders(root)))
        raise UserError(f"{root}: no checkpoint of iteration {iteration}; there are: {there or 'none'}")
    return folder


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON state of one checkpoint.

    Raises:
        UserError: damaged.
    """
    state = read_json(folder / STATE)
    if type(state.get("iteration")) is not int or state["iteration"] < 0:
        raise UserError(f"{folder / STATE}: iteration is {state.get('iteration')!r}, expected a number")
    return state


def latest_checkpoint(root: Path) -> Path | None:
    """The checkpoint that the tracker names; if that is missing or a file has another size, the newest complete one.

    Returns:
        None where there are no checkpoints.

    Raises:
        UserError: there are checkpoints, or was one, and none is whole.
    """
    complaints, folders = _in_order(root)
    for folder in folders:
        complaint = _complaint(folder)
        if complaint is None:
            return folder
        complaints.append(complaint)
    _refuse(root, complaints)
    return None


def find_checkpoint(root: Path, world: World) -> Path | None:
    """`latest_checkpoint`, with every byte compared to its recorded hash; ranks share the files. Collective.

    One that does not load is passed over too (`loading`). The main process says which were passed over, and why.

    Raises:
        UserError: as `latest_checkpoint`, on every rank; neither the newest nor the one before it can be loaded.
    """
    complaints, folders = world.from_main(_loadable(root) if world.is_main else ([], []))
    for folder in folders:
        found = [world.from_main(_complaint(folder) if world.is_main else None)]
        if found[0] is None:
            found = world.from_all(_damage(folder, world))
        problems = [problem for problem in found if problem is not None]
        if not problems:
            if complaints and world.is_main:
                warn(f"{'; '.join(complaints)}; resuming from {folder.name}")
            return folder
        complaints.append(problems[0])
    _refuse(root, complaints)
    return None


def prune_checkpoints(root: Path, keep: int, newest: int, also: Path | None) -> None:
    """Removes the checkpoints up to iteration `newest`, but keeps the `keep` newest of them and `also`. One process.

    Later checkpoints are from before the run went back to an older one; they stay until they are written again. A
    checkpoint that holds files of others stays too.
    """
    for folder in _folders(root, newest)[keep:]:
        if folder == also:
            continue
        if not (strange := unlisted(folder)):
            retire(folder)
        elif folder not in _told:
            _told.add(folder)
            warn(f"{folder}: kept, because its {FILE} does not list {strange[0]}")


def retire(folder: Path) -> None:
    """Removes a checkpoint, or an export; a kill in the middle leaves no folder that looks whole.

    Raises:
        UserError: something that is not ours has the name of the temporary folder that it takes.
    """
    doomed = folder.with_suffix(".tmp")
    drop_scratch(doomed)  # left by a kill in an earlier call
    mark_scratch(doomed)
    os.rename(folder, doomed / INSIDE)
    drop_scratch(doomed)


def make_way(folder: Path) -> None:
    """Frees the name `folder`: removes a checkpoint, and moves aside whatever holds files of others."""
    if not os.path.lexists(folder):
        return
    if folder.is_dir() and not folder.is_symlink() and not unlisted(folder):
        retire(folder)
        return
    aside = folder.with_name(f"{folder.name}.aside-{secrets.token_hex(4)}")
    warn(f"{folder}: has files that its {FILE} does not list; renamed to {aside.name}")
    os.rename(folder, aside)


def remove_leftovers(root: Path) -> None:
    """Removes what killed processes left: unfinished checkpoints, trackers not yet renamed."""
    for leftover in root.glob("iter_*.tmp"):
        drop_scratch(leftover)
    # A kill in `write_durably` leaves a temporary file with the number or a part of it; anything else is not ours.
    for tracker in root.glob(f"{TRACKER}.*.tmp"):
        if _TRACKER_TEMPORARY.fullmatch(tracker.name) and re.fullmatch(rb"\d{,18}", read_bytes(tracker)):
            tracker.unlink(missing_ok=True)


def _in_order(root: Path) -> tuple[list[str], list[Path]]:
    """What is wrong with the tracker, and the checkpoints in the order in which they are tried."""
    folders = _folders(root)
    tracker = root / TRACKER
    if not tracker.exists():
        # Killed between the rename of the first checkpoint and the tracker's.
        return [f"{tracker}: missing"] if folders else [], folders
    text = read_bytes(tracker, limit=1 << 10).decode("utf-8", "replace").strip()
    tracked = checkpoint_folder(root, int(text)) if text.isascii() and text.isdigit() and len(text) < 19 else None
    if tracked in folders:
        return [], [tracked, *(folder for folder in folders if folder != tracked)]
    return [f"{tracker}: names iteration {text!r}, which is not there"], folders


def _loadable(root: Path) -> tuple[list[str], list[Path]]:
    """`_in_order`, without a checkpoint that does not load."""
    complaints, folders = _in_order(root)
    try:
        failed, folders = without_failed(root, folders)
    except UserError as error:
        failed, folders = str(error), []
    return [*complaints, *([] if failed is None else [failed])], folders


def _folders(root: Path, newest: int | None = None) -> list[Path]:
    """Finished checkpoints up to the iteration `newest`, newest first."""
    found = {}
    for path in root.glob("iter_*"):
        match = _NAME.fullmatch(path.name)
        if match and (newest is None or int(match[1]) <= newest):
            found[int(match[1])] = path
    return [path for _, path in sorted(found.items(), reverse=True)]


def _complaint(folder: Path) -> str | None:
    """What is wrong with a checkpoint, as far as names and sizes tell."""
    try:
        check_sizes(folder)
        read_state(folder)
    except UserError as error:
        return str(error)
    return None


def _damage(folder: Path, world: World) -> str | None:
    """What is wrong with the contents of this rank's share of the files."""
    try:
        damaged = damaged_files(folder, share=(world.rank, world.world_size))
    except UserError as error:
        return str(error)
    return f"{folder / damaged[0]}: damaged: its hash differs from the one recorded" if damaged else None


def _refuse(root: Path, complaints: list[str]) -> None:
    if complaints:
        raise UserError(f"{root}: no complete checkpoint to resume from: {'; '.join(complaints)}")
