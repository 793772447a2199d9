"""The calibration data: windows of the joined texts, as BlockPruner's reference makes them, or samples row by row."""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from fusemega.checkpoint.open_model import ModelSource
from fusemega.errors import UserError
from fusemega.passes.batches import RowShape, global_batch, prepare_together
from fusemega.passes.micro_batch import Fields, FieldShapes, MicroBatch, collate
from fusemega.runtime.console import global_rank, say
from fusemega.runtime.parallel import World
from fusemega.text.conversation import Text
from fusemega.text.data import DataConfig, Source
from fusemega.text.document import BadRow, parse
from fusemega.text.sample import Sample
from fusemega.text.tokenizer import Tokenizer

Windows = Literal["joined", "rows"]
_BETWEEN = "\n\n"


@dataclass(frozen=True)
class Calibration:
    """What perplexities are measured on.

    Attributes:
        batches: the same on every data-parallel rank; under context parallelism this rank's part of them.
        tokens: how many tokens are predicted in all of them.
        content_hash: hex digest of all token ids, and of which tokens are predicted.
    """

    batches: list[MicroBatch]
    tokens: int
    content_hash: str


def joined_windows(data: DataConfig, samples: int | None, seed: int, tokenizer: Tokenizer) -> list[np.ndarray]:
    """The rows' texts joined by two newlines, tokenized once, cut into windows of `data.seq_length`.

    What is left at the end is dropped. One window at least.

    Args:
        samples: draws so many rows without replacement; None: all rows, in order.
        seed: of that draw.

    Returns:
        int64 [seq_length] arrays.

    Raises:
        UserError: a row that is no text, fewer rows than `samples`, or less text than a window.
    """
    texts = _texts(data)
    where = data.path if isinstance(data.path, str) else ", ".join(data.path)
    if samples is not None:
        if samples > len(texts):
            raise UserError(f"samples: {samples}, and {where} has {len(texts)} rows; allowed: 1 to {len(texts)}")
        texts = random.Random(seed).sample(texts, samples)
    (encoding,) = tokenizer.encode([_BETWEEN.join(texts)])
    ids = np.concatenate([np.asarray(tokenizer.prefix_ids, dtype=np.int64), encoding.ids.astype(np.int64)])
    number = len(ids) // data.seq_length
    if not number:
        raise UserError(
            f"{where}: its text has {len(ids)} tokens, too few for one window of data.seq_length {data.seq_length}; "
            "give more text, or a smaller seq_length"
        )
    return list(ids[: number * data.seq_length].reshape(number, data.seq_length))


def _texts(data: DataConfig) -> list[str]:
    """The rows' texts; `data.on_bad_row: skip` leaves others out and says how many."""
    source, ignored, skipped = Source(data), Counter[str](), Counter[str]()
    out = []
    for row in islice(source.rows(), data.limit):
        try:
            if isinstance(row.value, BadRow):
                raise row.value
            document = parse(row.value, ignored if data.unknown_fields == "ignore" else None)
            if not isinstance(document, Text):
                raise BadRow("conversation", "windows: joined takes rows of text; for conversations use windows: rows")
        except BadRow as error:
            if data.on_bad_row == "error":
                raise UserError(f"{source.names[row.file]}:{row.number}: {error}") from None
            skipped[error.reason] += 1
            continue
        out.append(document.text)
    for what, counted in (("rows were skipped", skipped), ("unknown fields were left out", ignored)):
        if counted and global_rank() == 0:
            say(f"{what}: " + ", ".join(f"{number} ({name})" for name, number in counted.items()))
    return out


def calibration(
    data: DataConfig,
    windows: Windows,
    samples: int | None,
    seed: int,
    source: ModelSource,
    shape: RowShape,
    world: World,
    cache: Path,
) -> Calibration:
    """The rows that are run. Collective.

    Args:
        data: where the rows come from.
        windows: "joined": see `joined_windows`; "rows": this project's samples, with its supervised tokens.
        samples: number of rows drawn; None: all.
        seed: of the draw.
        cache: where tokenized rows are kept.

    Raises:
        UserError: as `joined_windows` and `prepare_together`; ids beyond the model's vocabulary.
    """
    if windows == "joined":
        found = joined_windows(data, samples, seed, source.tokenizer)
        _check_ids(found, source)
        batches = _collated([_sample(ids) for ids in found], shape, world)
        hashed: Sequence[np.ndarray] = found
    else:
        dataset = prepare_together(data, source.tokenizer, cache, source.vocab_size, world)
        ids: Sequence[int] = range(len(dataset))
        if samples is not None:
            if samples > len(ids):
                raise UserError(f"samples: {samples}, and the data has {len(ids)}; allowed: 1 to {len(ids)}")
            ids = sorted(random.Random(seed).sample(ids, samples))
        alone = replace(world, dp_rank=0, dp_size=1)  # each data-parallel rank has all rows
        batches = global_batch(dataset, [[i] for i in ids], Fields(), shape, alone).micro_batches
        hashed = [array for i in ids for array in (dataset[i].ids, dataset[i].supervised)]
    digest = hashlib.blake2b(digest_size=16)
    for array in hashed:
        digest.update(len(array).to_bytes(8, "little") + array.astype("<i8").tobytes())
    return Calibration(batches, sum(batch.num_positions for batch in batches), digest.hexdigest())


def _check_ids(windows: Sequence[np.ndarray], source: ModelSource) -> None:
    largest = max(int(ids.max()) for ids in windows)
    if largest >= source.vocab_size:
        raise UserError(f"{source.hf}: the tokenizer gives id {largest}, and the model has {source.vocab_size} rows")


def _sample(ids: np.ndarray) -> Sample:
    supervised = np.ones(len(ids), dtype=bool)
    supervised[0] = False
    return Sample(b"", ids, supervised, np.full(len(ids), -1), 0, "calibration data")


def _collated(samples: Sequence[Sample], shape: RowShape, world: World) -> list[MicroBatch]:
    """`micro_batch_size` windows in each micro-batch, in order."""
    like = FieldShapes.of(Fields(), samples[:1])
    out = []
    for start in range(0, len(samples), shape.micro_batch_size):
        part = samples[start : start + shape.micro_batch_size]
        tokens = math.ceil(sum(len(sample.ids) for sample in part) / shape.unit) * shape.unit
        batch = collate(
            [[sample] for sample in part], Fields(), tokens, shape.pad_id, like, world.layout.segment_multiple
        )
        out.append(batch.context_part(world.cp_rank, world.cp_size) if world.cp_size > 1 else batch)
    return out
