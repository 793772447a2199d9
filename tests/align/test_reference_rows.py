"""Projected rows of the published methods against plain loops, on real texts and tokenizers."""

from __future__ import annotations

import json
import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from fusemega.align.dtw import decoded_strings, form_strings
from fusemega.align.projection import project
from fusemega.align.reference_rows import Aligner, first_wins, reference_row
from fusemega.fixtures.data import ChatData
from fusemega.store import Row
from fusemega.text.sample import Sample
from fusemega.text.tokenizer import Tokenizer
from tests.align.published import Published, aligned
from tests.align.real import CONTENTS, annotated, chat, real_tokenizers
from tests.text.toys import byte_level, sentencepiece

K = 6


def sample(tokenizer: Tokenizer, row: dict) -> Sample:
    got = annotated(tokenizer, row)
    return Sample(b"k" * 16, got.ids, got.supervised, got.end_bytes, int(got.target_bytes.sum()), "test")


def random_row(rng: np.random.Generator, sample: Sample, common: np.ndarray) -> Row:
    """Entries among a text's own tokens and some others, in any order of ids."""
    positions = sample.positions
    ids_PK = np.stack([rng.permutation(common)[:K] for _ in positions]).astype(np.int32)
    logits_PK = -np.sort(rng.exponential(2.0, (len(positions), K)), axis=1)
    log_total_P = np.log(np.exp(logits_PK).sum(axis=1) + 0.05)
    return Row(
        sample.ids_hash,
        sample.end_bytes[positions],
        ids_PK,
        (logits_PK - log_total_P[:, None]).astype(np.float32),
        (np.log(0.05) - log_total_P).astype(np.float32),
        -12.5,
        sample.num_bytes,
    )


def expected_rows(
    published: Published, source: Sample, target: Sample, row: Row, own: Row, strings: list, pad_to: int
) -> list[dict[int, float]]:
    sides = []
    for side, string in zip((source, target), strings, strict=True):
        ids = side.ids.tolist() + [string.pad_id] * (pad_to - len(side.ids))
        sides.append([(i, string.of_id[i]) for i in ids])
    steps = aligned(
        [text for _, text in sides[0]],
        [text for _, text in sides[1]],
        published.source_mark,
        published.target_mark,
        fusellm=published.fusellm,
    )
    rows = {int(t): (row.ids_PK[p].tolist(), row.logp_PK[p].tolist()) for p, t in enumerate(source.positions)}
    found = published.project(*sides, rows, steps, target.positions.tolist())
    for p, distribution in enumerate(found):
        if distribution == "nothing":
            weights = np.exp(own.logp_PK[p].astype(np.float64))
            found[p] = dict(zip(own.ids_PK[p].tolist(), (weights / weights.sum()).tolist(), strict=True))
    return found  # type: ignore[return-value]


def check(kind: str, names: tuple[str, str], texts: list[dict], pad: int = 0, fusellm: bool = False) -> Counter[str]:
    """Compares every position of every text; returns where the positions learnt from."""
    (source_tokenizer, source), (target_tokenizer, target) = real_tokenizers(*names).values()
    rng = np.random.default_rng(0)
    if fusellm:
        strings = [form_strings(source_tokenizer, source), form_strings(target_tokenizer, target)]
    else:
        strings = [decoded_strings(source_tokenizer, source.marker), decoded_strings(target_tokenizer, target.marker)]
    mapped = rng.integers(-1, 400, source.size).astype(np.int32)
    vocabulary_map = SimpleNamespace(kind=kind, table_S=mapped)
    ids = {form: i for i, form in enumerate(target.forms) if form}
    published = Published(
        kind.split("_")[0],
        source.marker,
        target.marker,
        source.forms,
        ids,
        {u: int(p) for u, p in enumerate(mapped) if p >= 0},
        fusellm,
    )
    counts: Counter[str] = Counter()
    for text in texts:
        one, two = sample(source_tokenizer, text), sample(target_tokenizer, text)
        row = random_row(rng, one, np.unique(np.concatenate([one.ids, np.arange(100, 250)])))
        own = random_row(rng, two, np.unique(np.concatenate([two.ids, np.arange(100, 250)])))
        pad_to = max(len(one.ids), len(two.ids)) + pad if pad else 0
        aligner = Aligner.of(source, strings[0], target, strings[1], vocabulary_map, pad_to)
        got, kinds = reference_row(aligner, one, two, row, own)
        counts += kinds
        assert (got.ids_hash, got.num_bytes) == (two.ids_hash, one.num_bytes)
        np.testing.assert_array_equal(got.end_bytes, two.end_bytes[two.positions])
        assert (got.log_residual_P == -np.inf).all()
        for p, expected in enumerate(expected_rows(published, one, two, row, own, strings, pad_to)):
            entries = {int(i): float(np.exp(v)) for i, v in zip(got.ids_PK[p], got.logp_PK[p], strict=True)}
            assert len(entries) == got.ids_PK.shape[1]  # distinct
            assert {i: v for i, v in entries.items() if v > 0} == pytest.approx(expected, rel=1e-5)
    return counts


def texts(chat_files: ChatData) -> list[dict]:
    lines = chat_files.held_out.read_text(encoding="utf-8").splitlines()[:4]
    messages = [json.loads(line)["messages"] for line in lines]
    english = [chat(m[0]["content"][:120], m[1]["content"][:150]) for m in messages]
    return english + [chat("x", content) for content in CONTENTS[1:5]] + [chat(*CONTENTS[:4])]


@pytest.mark.parametrize("kind", ["exact", "mined", "ms", "ms_reference"])
@pytest.mark.parametrize("names", [("llama2", "gpt2"), ("gpt2", "mistral_v3")])
def test_rows_against_the_description(kind: str, names: tuple[str, str], chat_files: ChatData) -> None:
    counts = check(kind, names, texts(chat_files))
    assert counts["row"] + counts["own"] > 30 and counts["label"] > 10


def test_rows_of_padded_sequences(chat_files: ChatData) -> None:
    check("ms", ("llama2", "gpt2"), texts(chat_files)[:5], pad=20)


@pytest.mark.parametrize("kind", ["exact", "mined"])
def test_fusellm_as_described(kind: str, chat_files: ChatData) -> None:
    counts = check(kind, ("llama2", "gpt2"), texts(chat_files)[:5], fusellm=True)
    assert counts["row"] + counts["own"] > 30 and counts["label"] > 10


def test_where_nothing_is_left_the_targets_own_row_stands() -> None:
    tokenizers = sentencepiece("chatml"), byte_level("chatml")
    one, two = (sample(tokenizer, chat("x", "hello world, hello fox")) for tokenizer in tokenizers)
    strings = [decoded_strings(tokenizer, mark) for tokenizer, mark in zip(tokenizers, "▁Ġ", strict=True)]
    nothing = np.full(tokenizers[0].num_ids, -1, dtype=np.int32)
    rng = np.random.default_rng(0)
    row, own = (random_row(rng, side, np.arange(40)) for side in (one, two))
    aligner = Aligner("ms", *strings, nothing, nothing, pad_to=0)
    steps = aligner.steps(one.ids, two.ids)[two.positions]
    got, kinds = reference_row(aligner, one, two, row, own)
    assert kinds["row"] == 0 and kinds["own"] == (steps >= 0).sum() > 0
    np.testing.assert_array_equal(got.ids_PK[steps >= 0], own.ids_PK[steps >= 0])
    # Sums to 1 without the mass outside its ids.
    np.testing.assert_allclose(np.exp(got.logp_PK[steps >= 0]).sum(axis=1), 1, rtol=1e-5)
    assert got.num_scored == row.num_tokens


def test_traps_of_the_reference_and_the_default_without_them() -> None:
    """Equal ids: the first one's mass alone counts, and what has no id is shared out; the default keeps both."""
    table = np.array([7, 7, -1, 9])
    ids, logp = np.array([[0, 1, 2, 3]]), np.log(np.array([[0.4, 0.3, 0.1, 0.1]], dtype=np.float32))
    got_ids, got_logp = first_wins(ids, logp, table)
    assert got_ids.tolist() == [[7, 9, -1, -1]]
    assert np.exp(got_logp[0, :2]) == pytest.approx([0.4 / 0.5, 0.1 / 0.5], rel=1e-6)
    kept_ids, kept_logp, residual = project(ids, logp, np.log(np.array([0.1], dtype=np.float32)), table)
    assert kept_ids.tolist() == [[7, 9, -1, -1]]
    assert np.exp(kept_logp[0, :2]) == pytest.approx([0.7, 0.1], rel=1e-6)
    assert np.exp(residual) == pytest.approx([0.2], rel=1e-6)


def test_first_wins_takes_rows_in_any_order() -> None:
    rng = random.Random(0)
    for _ in range(50):
        ids = rng.sample(range(20), 5)
        logp = [-rng.random() * 9 for _ in ids]
        table = [rng.randint(-1, 6) for _ in range(20)]
        got_ids, got_logp = first_wins(np.array([ids]), np.array([logp], dtype=np.float32), np.array(table))
        survivors: dict[int, float] = {}
        for value, i in sorted(zip(logp, ids, strict=True), reverse=True):
            if table[i] >= 0:
                survivors.setdefault(table[i], np.exp(value))
        total = sum(survivors.values())
        assert got_ids[0, : len(survivors)].tolist() == list(survivors)
        assert np.exp(got_logp[0, : len(survivors)]) == pytest.approx([v / total for v in survivors.values()], rel=1e-5)
        assert (got_ids[0, len(survivors) :] == -1).all() and (got_logp[0, len(survivors) :] == -np.inf).all()
