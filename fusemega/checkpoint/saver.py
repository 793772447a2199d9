"""Writes the checkpoints of a run, at once or in the background, each complete or not at all.

A save has two parts. First every rank plans and takes a copy of what it writes: on a GPU to host memory, on a CPU by
forking. Then a forked process writes, and notes the hashes of the files it wrote. When all ranks' processes have ended
the save is finalised: the main process writes the manifests, renames the folder, moves the tracker and removes what is
older than wanted. In the background, only the first part holds up the training.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pickle
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

from fusemega.checkpoint.index_file import read_index
from fusemega.checkpoint.series import (
    STATE,
    TRACKER,
    checkpoint_folder,
    make_way,
    prune_checkpoints,
    remove_leftovers,
)
from fusemega.checkpoint.torch_dist import checkpoint_errors
from fusemega.errors import UserError
from fusemega.files.integrity import file_hash, write_integrity
from fusemega.files.json_files import read_json
from fusemega.files.output import INSIDE, publish, write_durably
from fusemega.files.owned import drop_scratch, mark_scratch
from fusemega.runtime.memory import own_memory
from fusemega.runtime.parallel import World
from fusemega.runtime.signals import STOPPING
from fusemega.runtime.together import on_main

_HASHES, _MEMORY = ".hashes.json", ".memory"
_LOST_WRITER = "the process that writes it was ended from outside, as the kernel does where memory is short"


@dataclass(frozen=True)
class _Save:
    """A checkpoint that is being saved."""

    iteration: int
    place: Path
    final: Path
    began: float

    @property
    def temporary(self) -> Path:
        """Where it is written, in its temporary folder."""
        return self.place / INSIDE


class CheckpointSaver:
    """One save at a time. Every method is collective.

    Leaving the `with` block waits for a save that is in progress, also after a UserError in the training: the copy that
    it writes was taken before.

    Args:
        root: the run's `checkpoints` folder.
        world: this process's place.
        in_background: return from `save` as soon as the copy is taken.
        keep: how many of the newest checkpoints to keep; None: all.
        published: called by the main process with a checkpoint's iteration, and the seconds from the call of `save`
            until the checkpoint had its name.

    Attributes:
        writers_bytes: the most memory that the processes which wrote this rank's part of a save held besides its own.
    """

    def __init__(
        self,
        root: Path,
        world: World,
        in_background: bool,
        keep: int | None,
        published: Callable[[int, float], None] = lambda iteration, seconds: None,
    ) -> None:
        self._root, self._world, self._in_background, self._keep = root, world, in_background, keep
        self._published = published
        # Of this process alone: the writers of a killed run may live on, and write into folders of that run's name.
        self._own = world.from_main(secrets.token_hex(4))
        self.writers_bytes = 0
        self._queue = AsyncCallsQueue()
        self._saving: _Save | None = None

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # `wait` is collective, and only a UserError is raised on every rank: after another, some might wait in vain.
        if kind is None or issubclass(kind, UserError):
            self.wait()

    def save(
        self,
        iteration: int,
        contents: Mapping[str, Any],
        state: Mapping[str, Any],
        also_keep: Path | None,
        describe: Callable[[Path], None],
    ) -> Path:
        """Write `root/iter_{iteration:07d}`, then point the tracker at it.

        Args:
            iteration: finished iterations.
            contents: Megatron's sharded state.
            state: JSON-able values stored in `state.json`; `read_state` gives them back.
            also_keep: an older checkpoint that this one refers to.
            describe: writes what else belongs into the folder; called by the main process.

        Returns:
            the folder; in the background, it does not exist yet.

        Raises:
            UserError: this save, or the one before it in the background, failed; a full disk, for example.
        """
        began = time.monotonic()
        self.wait()
        filesystem_async._results_queue = _WriteResults()
        final = checkpoint_folder(self._root, iteration)
        saving = _Save(iteration, final.with_name(f"{final.name}.{self._own}.tmp"), final, began)
        on_main(self._world, partial(self._prepare, saving))
        with self._failures(saving):
            request = dist_checkpointing.save(
                dict(contents),
                str(saving.temporary),
                # Data-parallel ranks hold the same weights: each writes a part of them.
                FullyParallelSaveStrategyWrapper(
                    get_default_save_sharded_strategy(),
                    parallel_state.get_data_parallel_group(with_context_parallel=True),
                ),
                async_sharded_save=True,
            )
            if request.async_fn is not None:  # this rank has something to write
                write = partial(_write_and_hash, request.async_fn, saving.temporary, os.getpid())
                request = request._replace(async_fn=write)
            request.add_finalize_fn(partial(self._take_notes, saving))
            request.add_finalize_fn(
                lambda: on_main(self._world, lambda: self._publish(saving, state, also_keep, describe))
            )
            if self._in_background:
                self._queue.schedule_async_request(request)
                self._saving = saving
            else:
                request.execute_sync()
        return final

    def poll(self) -> None:
        """Finalise a save whose writers have ended on all ranks; returns at once if they have not.

        Raises:
            UserError: it failed.
        """
        self._finalise(blocking=False)

    def wait(self) -> None:
        """Finalise the save in progress, if there is one.

        Raises:
            UserError: it failed.
        """
        self._finalise(blocking=True)

    def _finalise(self, blocking: bool) -> None:
        if self._saving is None:
            return
        saving = self._saving
        try:
            with self._failures(saving):
                done = self._queue.maybe_finalize_async_calls(blocking)
        except UserError:
            self._saving = None
            raise
        if done:
            self._saving = None

    def _prepare(self, saving: _Save) -> None:
        with checkpoint_errors(f"{saving.final}: checkpoint not saved", self._root):
            self._root.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self._root)
            mark_scratch(saving.place)
            saving.temporary.mkdir()

    def _take_notes(self, saving: _Save) -> None:
        """Reads what this rank's writers noted of their memory, before the main process removes the note."""
        note = saving.temporary / f"{self._world.rank}{_HASHES}"
        if note.is_file():
            self.writers_bytes = max(self.writers_bytes, int(read_json(note)["memory"]))
        self._world.barrier()  # the main process removes the notes in the next step

    def _publish(
        self,
        saving: _Save,
        state: Mapping[str, Any],
        also_keep: Path | None,
        describe: Callable[[Path], None],
    ) -> None:
        with checkpoint_errors(f"{saving.final}: checkpoint not saved", saving.temporary):
            hashes = _collect_hashes(saving.temporary)
            _check_shared(saving.temporary)
            text = json.dumps({"iteration": saving.iteration, **state}, indent=1)
            (saving.temporary / STATE).write_text(text, encoding="utf-8")
            describe(saving.temporary)
            write_integrity(saving.temporary, hashes)
            # In this order, because the process may be killed between any two steps: the tracker moves only when the
            # new folder is on disk under its name, and older checkpoints are removed only after that.
            make_way(saving.final)
            publish(saving.temporary, saving.final)
            drop_scratch(saving.place)
            write_durably(self._root / TRACKER, str(saving.iteration))
            if self._keep is not None:
                prune_checkpoints(self._root, self._keep, saving.iteration, also_keep)
            self._published(saving.iteration, time.monotonic() - saving.began)

    @contextlib.contextmanager
    def _failures(self, saving: _Save) -> Iterator[None]:
        """A failure is one line, and leaves nothing of the checkpoint."""
        try:
            with checkpoint_errors(f"{saving.final}: checkpoint not saved", saving.temporary):
                yield
        except UserError:
            if self._world.is_main:
                drop_scratch(saving.place)
            raise


def _write_and_hash(
    write: Callable[..., None], folder: Path, trainer: int, rank: int, buckets: list[Any], results: Any
) -> None:
    """Runs Megatron's writer, then hashes its files. In the background, it is the forked process's main function.

    Args:
        write: called with the last three arguments.
        folder: the folder written into.
        trainer: id of the process that trains.
        rank: rank of that process.
        buckets: (path, name below `folder`, contents) of each file.
        results: where `write` puts what it found.
    """
    if os.getpid() != trainer:
        gc.disable()  # it would free CUDA tensors of the training process
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)  # the trainer handles them, and waits for this process
    before = active_children()
    write(rank, buckets, results)
    # Where one of its writers fails, Megatron does not wait for the others. They add notes to a folder that is about to
    # be removed.
    for writer in active_children():
        if writer not in before:
            writer.join()
    # If a file is missing or the disk is full, `results` say so.
    with contextlib.suppress(OSError, UserError):
        hashes = {name: file_hash(folder / name) for _, name, _ in buckets}
        memory = own_memory() if os.getpid() != trainer else 0
        for note in [Path(f"{path}{_MEMORY}") for path, _, _ in buckets]:
            memory += int(note.read_text() or 0)
            note.unlink()
        write_durably(folder / f"{rank}{_HASHES}", json.dumps({"hashes": hashes, "memory": memory}))


def _measured_write(transforms: Any, **given: Any) -> None:
    """Megatron's writer of one file, which is a process of its own; it also notes the memory that it held."""
    _write_bucket(transforms, **given)
    with contextlib.suppress(OSError):
        Path(f"{given['write_bucket'][0]}{_MEMORY}").write_text(str(own_memory()), encoding="ascii")


_write_bucket = filesystem_async.FileSystemWriterAsync.write_preloaded_data
filesystem_async.FileSystemWriterAsync.write_preloaded_data = staticmethod(_measured_write)


def _collect_hashes(folder: Path) -> dict[str, str]:
    """The hashes that the ranks' writers noted, by name of file; removes the notes."""
    hashes: dict[str, str] = {}
    for note in folder.glob(f"*{_HASHES}*"):
        if note.name.endswith(_HASHES):
            hashes |= read_json(note)["hashes"]
        note.unlink()
    return hashes


def _check_shared(folder: Path) -> None:
    """Checks that this process sees every file that the index names; not so if a node wrote to a disk of its own."""
    for where in read_index(folder / ".metadata").storage_data.values():
        if not (folder / where.relative_path).is_file():
            raise UserError(
                f"{folder / where.relative_path}: written by another process, and not there; "
                "checkpoints need an output_dir that all nodes share"
            )


class _WriteResults:
    """Passes the results of Megatron's writer to the process that forked it, in a file without name that both hold.

    Megatron itself uses a manager's queue: one more process for every rank, which outlives a rank that is killed.
    """

    def __init__(self) -> None:
        self._file = TemporaryFile()  # noqa: SIM115 (open as long as this object)

    def put(self, results: Any) -> None:
        pickle.dump(results, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """What was put last and not taken yet.

        Raises:
            ChildProcessError: nothing or only a part is there, so the writer was killed: one that fails puts its
                exception.
        """
        self._file.seek(0)
        try:
            results = pickle.load(self._file)
        except (EOFError, pickle.UnpicklingError):
            raise ChildProcessError(_LOST_WRITER) from None
        self._file.seek(0)
        self._file.truncate()
        return results
