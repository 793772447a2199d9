"""Pairs of tokens side by side in a corpus, against plain loops."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from fusemega.align.corpus import sample_pairs
from fusemega.align.counts import count_pairs
from fusemega.align.dtw import decoded_strings
from fusemega.align.pairs import PairCounts
from fusemega.errors import UserError
from fusemega.text.data import DataConfig
from fusemega.text.dataset import TokenizedDataset, prepare
from fusemega.text.tokenizer import Tokenizer
from tests.align.published import aligned
from tests.text.toys import byte_level, sentencepiece

ROWS = [
    {"messages": [{"role": "user", "content": "hello fox"}, {"role": "assistant", "content": "the quick brown fox"}]},
    {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "hello 🚀 今天 world, hello"}]},
    {"text": "Grüße aus Köln the dog"},
]


def as_counter(pairs: PairCounts) -> Counter[tuple[int, int]]:
    found = list(zip(pairs.source_C.tolist(), pairs.target_C.tolist(), strict=True))
    assert found == sorted(set(found))
    return Counter(dict(zip(found, pairs.count_C.tolist(), strict=True)))


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Tokenizer, TokenizedDataset]]:
    folder = tmp_path_factory.mktemp("counts")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    config = DataConfig(path=str(folder / "data.jsonl"), seq_length=64)
    return [(t, prepare(config, t, folder)) for t in (sentencepiece("llama2"), byte_level("chatml"))]


def test_tokens_that_end_together(datasets: list[tuple[Tokenizer, TokenizedDataset]]) -> None:
    expected: Counter[tuple[int, int]] = Counter()
    (_, source), (_, target) = datasets
    for s, t in sample_pairs(source, target):
        seen: list[dict[int, int]] = []
        for sample in (source[s], target[t]):
            places: dict[int, int] = {}
            behind = -1  # the furthest byte so far: a token that ends there again has no text of its own
            for i, end in enumerate(sample.end_bytes.tolist()):
                if sample.supervised[i] and end > behind:
                    places[end] = int(sample.ids[i])
                behind = max(behind, end)
            seen.append(places)
        for end in seen[0].keys() & seen[1].keys():
            expected[(seen[0][end], seen[1][end])] += 1
    assert as_counter(count_pairs(source, target, workers=1)) == expected
    assert expected.total() > 10 and max(expected.values()) > 1


@pytest.mark.parametrize("pad_to", [0, 64])
def test_tokens_on_one_path(datasets: list[tuple[Tokenizer, TokenizedDataset]], pad_to: int) -> None:
    strings = tuple(decoded_strings(tokenizer, mark) for (tokenizer, _), mark in zip(datasets, "▁Ġ", strict=True))
    expected: Counter[tuple[int, int]] = Counter()
    (_, source), (_, target) = datasets
    for s, t in sample_pairs(source, target):
        ids = [
            sample.ids.tolist() + [side.pad_id] * (pad_to - len(sample.ids))
            for sample, side in zip((source[s], target[t]), strings, strict=True)
        ]
        texts = [[side.of_id[i] for i in line] for line, side in zip(ids, strings, strict=True)]
        for position, steps in enumerate(aligned(*texts, "▁", "Ġ")):
            for token in {ids[0][j] for j in steps}:
                expected[(token, ids[1][position])] += 1
    assert as_counter(count_pairs(source, target, "dtw", strings, pad_to, workers=1)) == expected


def test_nothing_in_common(datasets: list[tuple[Tokenizer, TokenizedDataset]], tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "something else"}) + "\n", encoding="utf-8")
    other = prepare(DataConfig(path=str(tmp_path / "other.jsonl"), seq_length=64), datasets[1][0], tmp_path)
    with pytest.raises(UserError, match="none of 1 samples"):
        count_pairs(datasets[0][1], other)
