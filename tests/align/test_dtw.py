"""The published alignment against loops, on random strings where ties abound, and on real tokens."""

from __future__ import annotations

import random

import numpy as np
import pytest

from fusemega.align.dtw import Rules, Strings, decoded_strings, dtw_reference
from tests.align.published import aligned
from tests.align.real import CONTENTS, real_tokenizers


def check(source_ids: list[int], target_ids: list[int], source: Strings, target: Strings) -> None:
    first, last = dtw_reference(np.array(source_ids), np.array(target_ids), source, target)
    expected = aligned(
        [source.of_id[i] for i in source_ids],
        [target.of_id[i] for i in target_ids],
        source.marker,
        target.marker,
        fusellm=source.rules == "fusellm",
    )
    assert [list(range(a, b + 1)) for a, b in zip(first, last, strict=True)] == expected


@pytest.mark.parametrize(("source_mark", "target_mark"), [("▁", "Ġ"), ("Ġ", "▁"), ("▁", "▁"), ("", "Ġ"), ("▁", "")])
@pytest.mark.parametrize("rules", ["fusechat", "fusellm"])
def test_paths_against_loops(source_mark: str, target_mark: str, rules: Rules) -> None:
    rng = random.Random(0)
    words = ["", "a", "b", "ab", "ba", "aab", "▁", "Ġ", "▁a", "Ġa", "Ġ▁", "\ufffd", " a", "bbb"]
    for _ in range(60):
        source, target = (
            Strings(tuple(rng.sample(words, len(words))), m, 0, rules) for m in (source_mark, target_mark)
        )
        sides = [rng.choices(range(len(words)), k=rng.randint(1, 12)) for _ in range(2)]
        check(*sides, source, target)


def test_padding_takes_part() -> None:
    """Padding moves the end of the path where it looks like text."""
    source, target = Strings(("a", "b", "x"), "", pad_id=2), Strings(("a", "b", "b"), "", pad_id=2)
    ids = np.array([0, 1, 1])
    padded = dtw_reference(source.padded(ids, 6), target.padded(ids[:2], 6), source, target)
    assert [len(side) for side in padded] == [6, 6]
    bare = dtw_reference(ids, ids[:2], source, target)
    assert bare[1].tolist() == [0, 2] and padded[1][:2].tolist() == [0, 1]
    assert source.padded(ids, 2).tolist() == [0, 1, 1]


def test_decoded_strings_are_what_transformers_decodes() -> None:
    tokenizers = real_tokenizers("llama2", "gpt2")
    for tokenizer, vocabulary in tokenizers.values():
        strings = decoded_strings(tokenizer, vocabulary.marker)
        for i in [*range(0, tokenizer.num_ids, 997), *tokenizer.encode(["Hello 你好 🚀"])[0].ids.tolist()]:
            assert strings.of_id[i] == tokenizer.hf.decode([i])
    source, target = (decoded_strings(t, v.marker) for t, v in tokenizers.values())
    for content in CONTENTS[:4]:
        ids = [tokenizer.encode([content])[0].ids.tolist() for tokenizer, _ in tokenizers.values()]
        check(*ids, source, target)
