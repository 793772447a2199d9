"""Pairs the samples of one data set under two tokenizers, and distributes work on them over processes."""

from __future__ import annotations

import pickle
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from fusemega.runtime.console import say
from fusemega.runtime.meeting import own_folder
from fusemega.runtime.workers import default_workers, start_workers
from fusemega.text.dataset import TokenizedDataset

R = TypeVar("R")
Pair = tuple[int, int]
_CHUNK = 32  # pairs in one work item
_WORTH = 8  # work items for which one more process is worth starting
_SAY_SECONDS = 15.0  # between two lines of progress


def sample_pairs(source: TokenizedDataset, target: TokenizedDataset) -> list[Pair]:
    """(index in `source`, index in `target`) of the samples with one key, in the target's order.

    Windows of long documents, which two tokenizers cut at different bytes, have none in common.
    """
    place = {key: i for i, key in enumerate(source.keys)}
    return [(place[key], t) for t, key in enumerate(target.keys) if key in place]


def map_pairs(
    function: Callable[[Any, Sequence[Pair]], R],
    context: Callable[[], Any],
    pairs: Sequence[Pair],
    what: str,
    workers: int | None = None,
) -> Iterator[R]:
    """Yields `function(context(), some of the pairs)` for all pairs, in any order, with progress on stderr.

    Args:
        function: a function of a module; its results are pickled.
        context: pickled once, called once in each process; what it returns is kept there.
        what: begins the line of progress.
        workers: processes; by default as many as there are cores and work for.
    """
    chunks = [pairs[i : i + _CHUNK] for i in range(0, len(pairs), _CHUNK)]
    count = workers or max(1, min(default_workers(), len(chunks) // _WORTH))
    done, begun = 0, time.monotonic()
    said = begun
    with tempfile.TemporaryDirectory(dir=own_folder()) as folder, start_workers(count) as pool:
        file = Path(folder) / "context.pickle"
        file.write_bytes(pickle.dumps(context))
        for chunk, result in pool.map(partial(_call, function, str(file)), chunks):
            yield result
            done += len(chunk)
            now = time.monotonic()
            if now - said > _SAY_SECONDS and done < len(pairs):
                said = now
                say(
                    f"{what} {done}/{len(pairs)} samples, about {(now - begun) * (len(pairs) - done) / done:.0f} s left"
                )
    say(f"{what} {done}/{len(pairs)} samples")


def _call(function: Callable[[Any, Sequence[Pair]], R], file: str, chunk: Sequence[Pair]) -> R:
    return function(_context(file), chunk)


@lru_cache(maxsize=1)
def _context(file: str) -> Any:
    return pickle.loads(Path(file).read_bytes())()
