"""Rows in which the responses to one prompt share it, token by token."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusemega.errors import UserError
from fusemega.inspect.data import _micro_batch as drawn
from fusemega.passes.batches import check_groups
from fusemega.passes.micro_batch import MicroBatch
from fusemega.runtime.layout import ParallelConfig
from fusemega.text.data import DataConfig
from fusemega.text.dataset import TokenizedDataset, prepare
from fusemega.text.packing import shared_beginning
from tests.passes.test_groups import BATCH, GROUPS, batches_of, dataset
from tests.text.toys import byte_level

__all__ = ["dataset"]  # the fixture


def texts(parts: list[MicroBatch]) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Each sequence, read back from the ranks' parts of a row: its tokens by position, its (position, label) pairs."""
    whole: list[tuple[list[int], list[tuple[int, int]]]] = []
    first = parts[0]
    own = [number for number, (start, end) in enumerate(first.prefixes) if end > start]
    numbers = {start: number for number, start in enumerate(first.bounds[:-1])}
    prompts = {numbers[first.prefixes[number][0]] for number in own}
    segments = [n for n in range(len(first.bounds) - 1) if n not in prompts][: len(first.sources)]
    # Where each rank's tokens lie in the whole row.
    tokens: dict[int, int] = {}
    positions: dict[int, int] = {}
    labels: dict[int, list[tuple[int, int]]] = {s: [] for s in range(len(first.sources))}
    for rank, part in enumerate(parts):
        places = _places(first, rank, len(parts))
        tokens |= dict(zip(places, part.tokens[0].tolist(), strict=True))
        positions |= dict(zip(places, part.position_ids[0].tolist(), strict=True))
        for index, label, s in zip(part.positions.tolist(), part.labels.tolist(), part.sequences.tolist(), strict=True):
            labels[s].append((part.position_ids[0, index].item(), label))
    for s, number in enumerate(segments):
        start, end = first.prefixes[number]
        read = [*range(start, end), *range(first.bounds[number], first.bounds[number + 1])]
        assert [positions[place] for place in read] == list(range(len(read))), "positions go on from the prompt's end"
        whole.append(([tokens[place] for place in read], sorted(labels[s])))
    return whole


def _places(batch: MicroBatch, rank: int, size: int) -> list[int]:
    if size == 1:
        return list(range(batch.bounds[-1]))
    found: list[int] = []
    for start, end in zip(batch.bounds, batch.bounds[1:], strict=False):
        piece = (end - start) // (2 * size)
        for at in (rank, 2 * size - 1 - rank):
            found += range(start + at * piece, start + (at + 1) * piece)
    return found


@pytest.mark.parametrize(("dp", "cp"), [(1, 1), (2, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("shape", [{}, {"packing": False}, {"micro_batch_size": 2}], ids=str)
def test_every_sequence_is_whole(dataset: TokenizedDataset, dp: int, cp: int, shape: dict[str, Any]) -> None:  # noqa: F811
    samples = {}
    for u in range(GROUPS):
        for i in dataset.unit(u):
            samples.setdefault(dataset[i].source, []).append(dataset[i])
    shared_tokens = seen = 0
    for step in range(GROUPS // BATCH):
        for ranks in batches_of(dataset, step, dp, cp, share_prefix=True, **shape):
            for parts in zip(*ranks, strict=True):
                whole = texts(list(parts))
                expected = [sample for source in dict.fromkeys(parts[0].sources) for sample in samples[source]]
                assert len(whole) == len(expected)
                for (tokens, labels), sample in zip(whole, expected, strict=True):
                    length = len(sample.ids)
                    assert tokens[:length] == sample.ids.tolist() and not any(tokens[length:])
                    assert labels == [(int(p), int(sample.ids[p + 1])) for p in sample.positions]
                    seen += 1
                shared_tokens += sum({start: end - start for start, end in parts[0].prefixes}.values())
                longest = max(b - a + y - x for (a, b), (x, y) in _segments(parts[0]))
                assert parts[0].max_seqlen == longest
    assert seen == len(dataset) and shared_tokens > 0


def _segments(batch: MicroBatch) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    return list(zip(zip(batch.bounds, batch.bounds[1:], strict=False), batch.prefixes, strict=True))


def test_the_drawing_says_what_is_shared(dataset: TokenizedDataset) -> None:  # noqa: F811
    batch = next(batch for batch in batches_of(dataset, 0, 1, 1, share_prefix=True)[0][0] if any(batch.prefixes))
    _, bar, legend = drawn(1, batch)
    lengths = [end - start for start, end in dict.fromkeys(batch.prefixes) if end > start]
    said = [int(length) for length in re.findall(r"(\d+) shared by", str(legend))]
    assert said == lengths and str(bar).count("=") >= len(said)
    assert re.findall(r"\S+rows.jsonl:\d+", str(legend)) == list(batch.sources)


def test_more_groups_fit_in_a_row(dataset: TokenizedDataset) -> None:  # noqa: F811
    def rows(share: bool) -> int:
        (ranks,) = batches_of(dataset, 0, 1, 1, share_prefix=share, seq_length=96)
        return sum(len(batch.group_sizes) > 0 for batch in ranks[0])

    assert rows(True) < rows(False)


def test_what_is_shared() -> None:
    def shared(*texts: str) -> int:
        return shared_beginning([np.frombuffer(text.encode(), dtype=np.uint8) for text in texts])

    assert shared("prompt yes", "prompt no") == 7 and shared("ab", "cd") == 0 and shared("ab") == 0
    assert shared("abcd", "abxx", "abcx") == 2
    assert shared("ab", "abcd") == 1, "each keeps a token of its own"


def test_a_group_may_fit_with_its_prompt_once(dataset: TokenizedDataset) -> None:  # noqa: F811
    units = [list(dataset.unit(u)) for u in range(GROUPS)]
    once = []
    for unit in units:
        ids = [dataset.ids(i) for i in unit]
        once.append(sum(map(len, ids)) - (len(ids) - 1) * shared_beginning(ids))
    check_groups(dataset, max(once), ParallelConfig(), share_prefix=True)
    with pytest.raises(UserError, match="a group lies in one row"):
        check_groups(dataset, max(once), ParallelConfig())
    with pytest.raises(UserError, match=r"its \d responses take \d+ tokens, \d+ of them shared, each padded"):
        check_groups(dataset, max(once) - 1, ParallelConfig(), share_prefix=True)


def test_what_fits_because_it_is_shared_is_not_cut(tmp_path: Path) -> None:
    row = {"prompt": "p" * 15, "responses": ["a" * 10, "b" * 10, "c" * 10]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")

    def prepared(seq_length: int, share: bool) -> TokenizedDataset:
        data = DataConfig(path=str(tmp_path / "rows.jsonl"), seq_length=seq_length)
        return prepare(data, byte_level(None), tmp_path / "cache", share_prefix=share)

    assert prepared(48, True).lengths.tolist() == [26] * 3, "15 and three times 11 tokens"
    assert prepared(47, True).lengths.tolist() == [25] * 3
    assert prepared(48, False).lengths.tolist() == [16] * 3, "each has the prompt"
