"""Converts whole folders between Hugging Face and Megatron, bit for bit: planned first, then copied by small processes.

No model is built. A plan says which boxes of which files make up every tensor of the output. It is cut into items, and
processes write them one by one, a block at a time, so memory does not grow with the model. Finished items are recorded
in a journal: an interrupted conversion can be resumed, and the output gets its name only when it is complete.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal

from fusemega.checkpoint.megatron_folder import (
    MegatronFolder,
    RunCheckpoint,
    common_dtype,
    describe_source,
    open_megatron,
)
from fusemega.checkpoint.torch_dist_files import (
    Checkpoint,
    Place,
    StoredChunk,
    empty_object,
    envelope,
    places,
    write_metadata,
)
from fusemega.convert.copying import Written, item_is, same_bits, write_item
from fusemega.errors import UserError
from fusemega.files.boxes import whole
from fusemega.files.integrity import check_contents, write_integrity
from fusemega.files.moves import ITEM_BYTES, Assembled, FilePart, Item, Move, as_is, window
from fusemega.files.output import refuse_existing
from fusemega.files.remembered import traces
from fusemega.files.unfinished import Unfinished, unfinished_folder
from fusemega.hf.check import check_tensors
from fusemega.hf.folder import HFFolder
from fusemega.hf.proof import check_written
from fusemega.hf.safetensors_writer import MAX_SHARD_SIZE, TensorInfo, file_header, plan_shards, write_index
from fusemega.hf.side_files import copy_side_files, exported_config, write_config
from fusemega.models.rules import WHOLE
from fusemega.runtime.console import say
from fusemega.runtime.meter import meter
from fusemega.runtime.workers import Workers, start_workers
from fusemega.text.vocabulary_files import read_vocabulary

# A chunk is read whole by every rank that needs a part of it, so it is small; a file is the unit of resumption.
CHUNK_BYTES = 64 << 20
ITEM_TARGET_BYTES = 256 << 20
_PLAN_VERSION = 2  # part of a journal's identity: an output that was begun under another plan is not continued


@dataclass(frozen=True)
class Report:
    """Time and memory of a conversion.

    Attributes:
        byte_count: bytes written, without those that an earlier call had finished.
        seconds: from the call until the output has its name.
        peak_bytes: the most resident memory of all processes together.
        processes: this one and those that copied.
    """

    byte_count: int
    seconds: float
    peak_bytes: int
    processes: int

    def __str__(self) -> str:
        speed = decimal(int(self.byte_count / self.seconds))
        many = "1 process" if self.processes == 1 else f"{self.processes} processes"
        return (
            f"{decimal(self.byte_count)} in {self.seconds:.1f} s ({speed}/s), "
            f"peak memory {decimal(self.peak_bytes)} in {many}"
        )


def import_hf(source: str | Path, out: str | Path, *, workers: int = 1, resume: bool = False) -> Report:
    """Hugging Face folder to Megatron folder, bit for bit. One process calls it.

    Args:
        source: a local Hugging Face folder.
        out: absent or empty; appears complete or not at all.
        workers: processes that copy.
        resume: continue from what an interrupted call has finished.

    Raises:
        UserError: the source is damaged or not supported, `out` is not empty, the disk is full.
    """
    begun = time.monotonic()
    out = Path(out)
    refuse_existing(out)
    folder = HFFolder(source)
    check_tensors(folder)
    check_written(folder)
    items, chunks, global_shapes = _plan_import(folder)
    identity = _identity("import", folder.files())
    with start_workers(workers) as pool:
        if workers > 1:  # avoids a second of imports that only the end needs
            threading.Thread(target=import_module, args=("torch.distributed.checkpoint",), daemon=True).start()
        _check_copies(folder, pool)
        with unfinished_folder(out, identity, resume, sum(item.nbytes for item in items), say) as unfinished:
            (unfinished.folder / "weights").mkdir(exist_ok=True)
            copied = _write(items, unfinished, pool, f"importing {folder.path.name}", digests=True)
            written = {item: Written(item.name, *unfinished.finished[item.name]) for item in items}
            digests = {name: digest for done in written.values() for name, digest in done.digests.items()}
            names = [name for place in places(folder.architecture) for name in place.rule.hf_shapes()]
            write_metadata(unfinished.folder / "weights", chunks, global_shapes)
            describe_source(unfinished.folder, folder, names, digests)
            write_integrity(unfinished.folder, {item.file: done.hash for item, done in written.items()})
        return _report(copied, begun, pool)


def export_megatron(
    source: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    workers: int = 1,
    resume: bool = False,
    iteration: int | None = None,
    finish: Callable[[Path], None] | None = None,
) -> Report:
    """Megatron folder to Hugging Face folder. One process calls it.

    Args:
        source: a folder that `import_hf` wrote; or a run's checkpoint, from which the fp32 main parameters are taken;
            or a run's folder or its `checkpoints`, which stand for the newest complete checkpoint.
        out: absent or empty; appears complete or not at all.
        dtype: dtype of the written weights (rounded to nearest even if narrower); None: those of the Hugging Face
            folder that they come from.
        max_shard_size: bytes of weights in a file.
        workers: processes that copy.
        resume: continue from what an interrupted call has finished.
        iteration: for a run's folder, the checkpoint to take instead of the newest.
        finish: called with the written folder before it gets its name; None: `settle`, if it is a run's checkpoint,
            and otherwise a line to the user if its tokenizer has ids without a row.

    Raises:
        UserError: the source is not a Megatron folder, `out` is not empty, the disk is full; a weight is too large for
            `dtype`.
    """
    refuse_existing(Path(out))
    folder = open_megatron(source, iteration)
    # A reading of its own: a file's hash needs all its bytes in order, and the copy reads them tensor by tensor.
    check_contents(folder.path, threads=workers)
    if finish is None:
        finish = (
            partial(_settled, checkpoint=folder) if isinstance(folder, RunCheckpoint) else partial(_kept, source=folder)
        )
    settings: dict[str, Any] = {"dtype": dtype, "max_shard_size": max_shard_size, "workers": workers}
    return export_folder(folder, out, **settings, resume=resume, finish=finish)


def _settled(made: Path, checkpoint: RunCheckpoint) -> None:
    """Checks and corrects the files beside a run's weights, as the run's own export does."""
    from fusemega.hf.loadable import settle  # imports transformers

    for note in settle(made, checkpoint.hf, chats=checkpoint.chats):
        say(note)


def _kept(made: Path, source: MegatronFolder) -> None:
    """An export from an imported folder keeps that folder's files as they were. Says if the tokenizer does not fit."""
    try:
        vocabulary = read_vocabulary(source.hf)
    except UserError as error:
        say(f"{error}; kept as it is")
        return
    rows = source.architecture.vocab_size
    if vocabulary is not None and (beyond := sorted(i for i in vocabulary.strings if i >= rows)):
        many, first = beyond[-1] + 1, vocabulary.strings[beyond[0]]
        say(f"{source.path}: the tokenizer has {many} ids, the model {rows} rows: none for {first!r} and after")


def export_folder(
    folder: MegatronFolder | HFFolder,
    out: str | Path,
    *,
    dtype: torch.dtype | None,
    max_shard_size: int = MAX_SHARD_SIZE,
    workers: int = 1,
    resume: bool = False,
    finish: Callable[[Path], None] | None = None,
) -> Report:
    """`export_megatron` for an open folder. In a Hugging Face folder, which is allowed too, only types change."""
    begun = time.monotonic()
    out = Path(out)
    refuse_existing(out)
    if isinstance(folder, MegatronFolder):
        checkpoint = Checkpoint(folder.weights)
        tensors, dtypes, files = checkpoint.hf_tensors(folder.architecture), folder.dtypes, checkpoint.files()
        side_files = folder.hf
    else:
        tensors = {
            name: as_is(folder.stored(name)) for place in places(folder.architecture) for name in place.rule.hf_shapes()
        }
        dtypes, files, side_files = {name: folder.dtype(name) for name in tensors}, folder.files(), folder.path
    infos = [TensorInfo(name, dtype or dtypes[name], tensor.shape) for name, tensor in tensors.items()]
    shards = plan_shards(infos, max_shard_size)
    items = _plan_export(tensors, shards)
    identity = _identity("export", files) | {"dtype": str(dtype), "max_shard_size": max_shard_size}
    with start_workers(workers) as pool:
        with unfinished_folder(out, identity, resume, sum(item.nbytes for item in items), say) as unfinished:
            copied = _write(items, unfinished, pool, f"exporting {folder.path.name}", digests=False)
            copy_side_files(side_files, unfinished.folder)
            write_index(unfinished.folder, shards)
            write_config(unfinished.folder, exported_config(folder.config, infos[0].dtype), sort_keys=True)
            if finish is not None:
                finish(unfinished.folder)
            # An item's hash is its file's hash only if the item is the whole file.
            parts = Counter(item.file for item in items)
            alone = [item for item in items if parts[item.file] == 1]
            write_integrity(unfinished.folder, {item.file: unfinished.finished[item.name][0] for item in alone})
        return _report(copied, begun, pool)


def _plan_import(folder: HFFolder) -> tuple[list[Item], list[StoredChunk], dict[str, tuple[int, ...]]]:
    """The `.distcp` files, each an item; their chunks, for the index; and the shapes of the global tensors."""
    all_places = places(folder.architecture)
    dtypes: dict[str, set[torch.dtype]] = {}
    for place in all_places:
        dtypes.setdefault(place.key, set()).update(folder.dtype(name) for name in place.rule.hf_shapes())
    stored_as = {key: str(common_dtype(found)).removeprefix("torch.") for key, found in dtypes.items()}
    items: list[Item] = []
    chunks: list[StoredChunk] = []
    for group in _grouped(all_places, lambda place: _parameter_bytes(place, stored_as[place.key]), ITEM_TARGET_BYTES):
        file = f"__0_{len(items)}.distcp"
        parts: list[FilePart] = []
        at = 0
        for place in group:
            for part, key, offsets, sizes in _parts(place, folder, stored_as[place.key]):
                parts.append(part)
                chunks.append(StoredChunk(key, offsets, sizes, stored_as[place.key], file, at, part.nbytes))
                at += part.nbytes
        items.append(Item(f"weights/{file}", 0, tuple(parts)))
    return items, chunks, {place.key: place.global_shape for place in all_places}


def _parts(
    place: Place, folder: HFFolder, dtype: str
) -> Iterable[tuple[FilePart, str, tuple[int, ...] | None, tuple[int, ...]]]:
    """One parameter as entries of a file: (part, key, offsets, sizes), its rows cut into chunks."""
    moves = [Move(folder.stored(p.hf), p.hf_box, p.local_box) for p in place.rule.pieces(WHOLE)]
    rows, *inner = place.shape
    row_bytes = _parameter_bytes(place, dtype) // rows
    rows_each = max(1, CHUNK_BYTES // row_bytes)
    ones = (1,) * len(place.leading)
    for start in range(0, rows, rows_each):
        stop = min(start + rows_each, rows)
        cut = window(moves, ((start, stop), *whole(tuple(inner))), (0,) * len(place.shape))
        shape = (stop - start, *inner)
        head, tail = envelope((*ones, *shape), dtype)
        tensor = Assembled(place.key, shape, dtype, tuple(cut))
        offsets = (*place.leading, start, *(0 for _ in inner))
        yield FilePart(head, tensor, tail), place.key, offsets, (*ones, *shape)
    extra = place.extra_state()
    if extra is not None:
        yield FilePart(empty_object()), extra, None, ()


def _parameter_bytes(place: Place, dtype: str) -> int:
    return torch.Size(place.shape).numel() * ITEM_BYTES[dtype]


def _plan_export(tensors: Mapping[str, Assembled], shards: Mapping[str, list[TensorInfo]]) -> list[Item]:
    """Items of consecutive tensors of the safetensors files; the first item of each file begins with its header."""
    items = []
    for file, shard in shards.items():
        at = 0
        head = file_header(shard)
        for group in _grouped(shard, lambda info: info.nbytes, ITEM_TARGET_BYTES):
            parts = []
            for info in group:
                dtype = str(info.dtype).removeprefix("torch.")
                parts.append(FilePart(head, Assembled(info.name, info.shape, dtype, tensors[info.name].moves)))
                head = b""
            items.append(Item(file, at, tuple(parts)))
            at += items[-1].nbytes
    return items


def _grouped(values: Iterable[Any], nbytes: Any, target: int) -> list[list[Any]]:
    """Consecutive values in groups of about `target` bytes; a larger value is a group of its own."""
    groups: list[list[Any]] = []
    filled = target
    for value in values:
        if filled + nbytes(value) > target:
            groups.append([])
            filled = 0
        groups[-1].append(value)
        filled += nbytes(value)
    return groups


def _identity(kind: str, files: Iterable[Path]) -> dict[str, Any]:
    """What the output depends on: the source's files as they are now, and the plan's own numbers."""
    return {"kind": kind, "version": [_PLAN_VERSION, CHUNK_BYTES, ITEM_TARGET_BYTES], "files": traces(list(files))}


def _write(items: list[Item], unfinished: Unfinished, pool: Workers, what: str, digests: bool) -> int:
    """Makes the items that are not finished; returns the number of bytes written."""
    begun = [item for item in items if item.name in unfinished.finished]
    # The journal proves that an item was written, not that nobody has changed it since: its bytes are hashed again.
    sound = partial(item_is, str(unfinished.folder))
    hashed = ((item, str(unfinished.finished[item.name][0])) for item in begun)
    finished = {item.name for (item, _), same in pool.map(sound, hashed) if same}
    left = [item for item in items if item.name not in finished]
    if begun:
        say(f"{what}: {len(finished)} of {len(items)} parts are finished already")
    for item in begun:
        if item.name not in finished:
            say(f"{unfinished.folder / item.file}: part {item.name} was changed after it was written; making it again")
    left.sort(key=lambda item: -item.nbytes)
    byte_count = sum(item.nbytes for item in left)
    with meter(what, byte_count) as done:
        for item, written in pool.map(partial(write_item, str(unfinished.folder), digests), left):
            unfinished.record(item.name, [written.hash, written.digests])
            done.add(item.nbytes)
    return byte_count


def _report(byte_count: int, begun: float, pool: Workers) -> Report:
    processes = 1 if pool.count == 1 else 1 + pool.count
    return Report(byte_count, time.monotonic() - begun, pool.peak_bytes, processes)


def _check_copies(folder: HFFolder, pool: Workers) -> None:
    """Checks that a tied model's folder that holds the head too holds the embedding there."""
    pairs = [
        (as_is(folder.stored(copy)), as_is(folder.stored(original)))
        for copy, original in folder.architecture.copies().items()
        if copy in folder
    ]
    alike = [pair for pair in pairs if pair[0].dtype == pair[1].dtype]
    equal = [pair for pair, same in pool.map(same_bits, alike) if same]
    for copy, original in pairs:
        if (copy, original) not in equal:
            raise UserError(
                f"{folder.path}: config.json ties the head to the embedding, but {copy.name} differs from "
                f"{original.name}"
            )
