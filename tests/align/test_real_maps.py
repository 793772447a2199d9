"""Maps between real vocabularies: whole ones for `exact`, samples of them where plain loops are slow."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from fusemega.align.counts import count_pairs
from fusemega.align.make_map import exact_map, first_piece_map, mined_map, ms_map, ms_reference_map
from fusemega.align.pieces import cutter
from fusemega.align.positions import shared_positions
from fusemega.align.vocabulary import Vocabulary
from fusemega.fixtures.data import ChatData
from fusemega.text.data import DataConfig
from fusemega.text.dataset import prepare
from tests.align import map_loops
from tests.align.real import real_tokenizers

NAMES = ("mistral_v3", "smollm2", "llama2")


@pytest.fixture(scope="module")
def loaded() -> dict:
    return real_tokenizers(*NAMES)


def check_exact(source: Vocabulary, target: Vocabulary) -> None:
    """Whole vocabularies against a dictionary, and against the published rule, which compares forms."""
    by_bytes: dict[bytes, int] = {}
    for usual in (True, False):
        for i in range(target.size):
            if target.contents[i] is not None and (i not in target.byte_tokens) == usual:
                by_bytes.setdefault(target.contents[i], i)
    roles = map_loops.roles(source, target)
    table_S = exact_map(source, target).table_S.tolist()
    assert table_S == [roles.get(u, by_bytes.get(c, -1)) for u, c in enumerate(source.contents)]
    by_form = {form: i for i, form in enumerate(target.forms) if form}
    for u, content in enumerate(source.contents):
        form = source.forms[u]
        published = by_form.get(form.replace(source.marker, target.marker), -1)
        if published != table_S[u]:
            # Byte-level forms of what is no ASCII or no graphic character, `<0xE2>`, special tokens, also ones that the
            # source spells as text: nothing else.
            plain = content is not None and content.isascii() and content.decode().isprintable()
            special = published >= 0 and target.contents[published] is None
            by_byte = u in source.byte_tokens or table_S[u] in target.byte_tokens
            assert not plain or special or by_byte, (form, published)


def check_mined(source: Vocabulary, target: Vocabulary, number: int) -> None:
    """Random tokens without an identical one, against another implementation's distances to the whole target."""
    made = mined_map(source, target)
    same = exact_map(source, target).table_S
    moved = [u for u in np.flatnonzero(made.table_S != same) if u not in map_loops.roles(source, target)]
    chosen = random.Random(0).sample(moved, min(number, len(moved)))
    offered = [p for p in range(target.size) if target.contents[p] is not None and p not in target.byte_tokens]
    distances_QN = cdist(
        [map_loops.text(source.contents[u]) for u in chosen],
        [map_loops.text(target.contents[p]) for p in offered],
        scorer=Levenshtein.distance,
        dtype=np.uint8,
    )
    assert [offered[i] for i in distances_QN.argmin(axis=1)] == made.table_S[chosen].tolist()
    kept = made.table_S == same
    assert (same[kept] >= 0).sum() == (same >= 0).sum()  # what has an identical token keeps it


@pytest.mark.parametrize(
    ("source", "target"), [("mistral_v3", "smollm2"), ("smollm2", "llama2"), ("llama2", "mistral_v3")]
)
def test_exact(loaded: dict, source: str, target: str) -> None:
    check_exact(loaded[source][1], loaded[target][1])


def test_mined(loaded: dict) -> None:
    source, target = loaded["mistral_v3"][1], loaded["smollm2"][1]
    check_mined(source, target, 300)
    table_S = mined_map(source, target).table_S
    small = random.Random(1).sample([u for u in range(source.size) if table_S[u] >= 0 and u > 1000], 12)
    fewer = random.Random(2).sample(range(17, target.size), 1200)
    cut = map_loops.vocabulary([target.contents[p] for p in sorted(fewer)])
    few = map_loops.vocabulary([source.contents[u] for u in small])
    assert mined_map(few, cut).table_S.tolist() == [map_loops.mined(u, few, cut) for u in range(few.size)]


def test_statistics_of_real_texts(loaded: dict, chat_files: ChatData, tmp_path: Path) -> None:
    config = DataConfig(path=str(chat_files.held_out), limit=24)
    for names in (("mistral_v3", "smollm2"), ("smollm2", "llama2")):
        (source_tokenizer, source), (target_tokenizer, target) = (loaded[name] for name in names)
        counts = count_pairs(*(prepare(config, t, tmp_path) for t in (source_tokenizer, target_tokenizer)), workers=1)
        pairs = {
            (s, p): n
            for s, p, n in zip(counts.source_C.tolist(), counts.target_C.tolist(), counts.count_C.tolist(), strict=True)
        }
        of_source: dict[int, dict] = {}
        for (s, p), n in pairs.items():
            of_source.setdefault(s, {})[s, p] = n
        ours, theirs = ms_map(source, target, counts).table_S, ms_reference_map(source, target, counts).table_S
        assert len(of_source) > 1000
        for u, own in of_source.items():
            assert theirs[u] == map_loops.published(u, own, source, target)
        known = set(target.contents)  # with None: special tokens go by role
        lacking = [u for u in of_source if source.contents[u] not in known]
        assert len(lacking) > 30
        assert all(ours[u] == map_loops.most_frequent(u, of_source[u], source, target) for u in lacking)
        never = np.setdiff1d(np.arange(source.size), [*of_source, source.bos_id, source.eos_id])
        assert set(theirs[never].tolist()) == {target.unk_id}


def test_first_pieces_are_what_comes_next(loaded: dict, chat_files: ChatData, tmp_path: Path) -> None:
    """Where the tokenizations meet, the source's next token becomes the target's, hardly ever another or nothing."""
    (theirs, source), (ours, target) = loaded["smollm2"], loaded["mistral_v3"]
    config = DataConfig(path=str(chat_files.held_out), seq_length=2048, limit=12)
    samples = [{sample.key: sample for sample in prepare(config, t, tmp_path)} for t in (theirs, ours)]
    said, labels = [], []
    maps = exact_map(source, target), first_piece_map(source, target, cutter(ours, target))
    for key in samples[0].keys() & samples[1].keys():
        a, b = samples[0][key], samples[1][key]
        at, to = shared_positions(a.end_bytes[a.positions], b.end_bytes[b.positions])
        inside = b.supervised[b.positions[to]]  # but for a message's first token
        said.append(np.stack([made.table_S[a.ids[a.positions[at][inside] + 1]] for made in maps]))
        labels.append(b.ids[b.positions[to][inside] + 1])
    said_MP, labels_P = np.concatenate(said, axis=1), np.concatenate(labels)
    exact, pieces = (said_MP == labels_P).mean(axis=1)
    assert len(labels_P) > 1000 and pieces > 0.98 > 0.93 > exact
    assert (said_MP[1] >= 0).all()
