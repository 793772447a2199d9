"""Every kind of map against plain loops on made-up vocabularies, and the file it is kept in."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from fusemega.align.cells import cells_map
from fusemega.align.kinds import KINDS
from fusemega.align.make_map import exact_map, first_piece_map, mined_map, ms_map, ms_reference_map
from fusemega.align.pieces import cutter
from fusemega.align.vocabulary import Vocabulary
from fusemega.align.vocabulary_map import VocabularyMap
from fusemega.errors import UserError
from tests.align import map_loops
from tests.align.map_loops import vocabulary
from tests.text.toys import byte_level, sentencepiece


@dataclass
class Counts:
    source_C: np.ndarray
    target_C: np.ndarray
    count_C: np.ndarray


def made_up(rng: random.Random, size: int, **facts) -> Vocabulary:
    words = {"".join(rng.choices("abé ", k=rng.randint(1, 5))).encode() for _ in range(size)}
    contents = [None, None, None, b"\xc3", *sorted(words, key=lambda word: (rng.random(), word)), b"a", None]
    return vocabulary(contents, byte_tokens=frozenset({3}), bos_id=0, eos_id=1, **facts)


def counted(rng: random.Random, source: Vocabulary, target: Vocabulary, number: int) -> tuple[dict, Counts]:
    pairs = {(rng.randrange(source.size), rng.randrange(target.size)): rng.choice((1, 1, 2, 50)) for _ in range(number)}
    columns = [
        np.array(column, dtype=np.int64) for column in zip(*((s, p, n) for (s, p), n in pairs.items()), strict=True)
    ]
    return pairs, Counts(*columns)


@pytest.mark.parametrize("seed", range(4))
def test_every_kind_is_what_plain_loops_make(seed: int) -> None:
    rng = random.Random(seed)
    source = made_up(rng, 60, unk_id=2, closing_id=2 if seed % 2 else 1)
    target = made_up(rng, 40, unk_id=None if seed % 2 else 2, closing_id=1, marker="▁" if seed < 2 else "Ġ")
    pairs, counts = counted(rng, source, target, 250)
    ids = range(source.size)
    roles = map_loops.roles(source, target)
    same = [roles.get(u, -1 if c is None else map_loops.same_bytes(c, target)) for u, c in enumerate(source.contents)]
    in_bytes = {c: i for i, c in enumerate(target.contents) if c is not None and len(c) == 1}

    def cut(content: bytes) -> list[int]:
        return [in_bytes[content[i : i + 1]] for i in range(len(content)) if content[i : i + 1] in in_bytes]

    own_bytes = {c: i for i, c in enumerate(source.contents) if c is not None and len(c) == 1}

    def cut_own(content: bytes) -> list[int]:
        return [own_bytes[content[i : i + 1]] for i in range(len(content)) if content[i : i + 1] in own_bytes]

    forward, backward = first_piece_map(source, target, cut), first_piece_map(target, source, cut_own)
    written = sorted({(rng.randrange(3, source.size), rng.randrange(3, target.size)) for _ in range(3)})
    cells = cells_map(source, target, forward, backward, tuple(np.array(written).T))  # type: ignore[arg-type]
    of_source, of_target = map_loops.cells(source, target, (cut, cut_own), written)
    assert cells.cell_T.dtype == np.int32 and cells.cell_T.tolist() == of_target
    assert 5 < len(set(of_target)) < target.size - 5 and np.isin(cells.marked_S, [-1, *of_target]).all()
    sizes = [of_target.count(v) for v in set(of_target)]
    assert cells.statistics["cell_sizes"] == {str(n): sizes.count(n) for n in sorted(set(sizes))}
    expected = [
        (cells, of_source),
        (exact_map(source, target), same),
        (first_piece_map(source, target, cut), [map_loops.first_piece(u, cut, source, target) for u in ids]),
        (mined_map(source, target), [map_loops.mined(u, source, target) for u in ids]),
        (ms_map(source, target, counts), [map_loops.most_frequent(u, pairs, source, target) for u in ids]),
        (ms_reference_map(source, target, counts), [map_loops.published(u, pairs, source, target) for u in ids]),
    ]
    assert [made.kind for made, _ in expected] == list(KINDS)
    for made, table in expected:
        assert made.table_S.dtype == np.int32 and made.table_S.tolist() == table, made.kind
    assert len({(tuple(table), made.cell_T.tobytes()) for made, table in expected}) == 6, (
        "two kinds agree: nothing was told apart"
    )
    assert len({made.content_hash for made, _ in expected}) == 6


@pytest.mark.parametrize("flip", [False, True], ids=["to sentencepiece", "to byte-level"])
def test_first_pieces_begin_their_tokens(flip: bool) -> None:
    tokenizers = [byte_level(), sentencepiece()][:: -1 if flip else 1]
    source, target = map(Vocabulary.of, tokenizers)
    exact_S = exact_map(source, target).table_S
    table_S = first_piece_map(source, target, cutter(tokenizers[1], target)).table_S
    new = np.flatnonzero((exact_S < 0) & (table_S >= 0))
    assert len(new) > 50 and (table_S[exact_S >= 0] == exact_S[exact_S >= 0]).all()
    for u in new:
        whole, first = source.contents[u], target.contents[table_S[u]]
        assert whole is not None and first and whole.startswith(first) and whole != first


def test_byte_tokens_markers_and_roles() -> None:
    """What the reference, which compares forms, gets otherwise."""
    source = vocabulary([None, b"a", b" a", b"\xc3\xa9", b"b", None], bos_id=0, eos_id=5, closing_id=5)
    target = vocabulary(
        [None, b"\xc3\xa9", b"a", b"a", b" a", None, None],
        forms=("<s>", "Ã©", "<0x61>", "a", "Ġa", "<end>", "<im_end>"),
        byte_tokens=frozenset({2}),
        marker="Ġ",
        bos_id=0,
        eos_id=5,
        closing_id=6,
    )
    table_S = exact_map(source, target).table_S
    assert table_S.tolist() == [0, 3, 4, 1, -1, 6]  # the end of a turn before the end of a text
    by_form = {form.replace("▁", "Ġ"): i for i, form in enumerate(source.forms)}
    assert "Ã©" not in by_form and "<0x61>" not in by_form
    assert exact_map(source, replace(target, closing_id=None)).table_S[5] == 5


def test_the_first_position_of_a_message() -> None:
    source = vocabulary([b" a", b"a", b"b", b" c", b" ", b" word", b"word", None, b"e"])
    target = vocabulary([b"a", b" a", b" b", b"words", b"c", b"e"])
    exact = exact_map(source, target)
    assert exact.table_S.tolist() == [1, 0, -1, -1, -1, -1, -1, -1, 5]
    # "  a" is no token; "a" becomes " a"; "e" has no " e" and stays itself.
    assert exact.marked_S.tolist() == [1, 1, 2, -1, -1, -1, -1, -1, 5]
    # " a" becomes "a", " c" "c"; " " alone stands for nothing then; what has no space stays.
    assert exact.unmarked_S.tolist() == [0, 0, -1, 4, -1, -1, -1, -1, 5]
    mined = mined_map(source, target)
    assert mined.unmarked_S[5] == mined.table_S[6] == 3  # " word" as the source's own "word", and that as "words"


def test_statistics() -> None:
    source = vocabulary([None, b"a", b"b", b"bb", b"ccc", None], eos_id=0)
    target = vocabulary([b"a", b"b", None], eos_id=2)
    counts = mined_map(source, target).statistics
    assert counts == {
        "source_tokens": 5,
        "identical": 2,
        "mapped": 5,
        "target_tokens_reached": 3,
        "sharing": {"1": 1, "2": 2},  # "a" and "ccc" (by the lowest id) share one, "b" and "bb" another
        "distances": [0, 1, 0, 1],
    }


def test_two_real_kinds_of_tokenizers() -> None:
    source, target = Vocabulary.of(sentencepiece()), Vocabulary.of(byte_level())
    made = exact_map(source, target)
    for u, p in enumerate(made.table_S):
        if p >= 0 and source.contents[u] is not None:
            assert source.contents[u] == target.contents[p]
    assert target.forms[made.table_S[source.closing_id]] == "<|im_end|>"
    assert exact_map(target, target).table_S[300:].tolist() == list(range(300, target.size))
    told = []
    mined_map(source, target, progress=lambda done, total: told.append((done, total)))
    assert told and told[-1][0] == told[-1][1]


@pytest.fixture
def saved(tmp_path: Path) -> tuple[VocabularyMap, Path]:
    made = mined_map(made_up(random.Random(5), 30), made_up(random.Random(6), 30))
    made.save(tmp_path / "new" / "map.npz")
    return made, tmp_path / "new" / "map.npz"


def test_a_file_is_the_map_again(saved: tuple[VocabularyMap, Path]) -> None:
    made, path = saved
    again = VocabularyMap.load(path)
    for name, value in vars(made).items():
        assert np.array_equal(value, getattr(again, name)), name
    assert again.content_hash == made.content_hash and type(again.source_marks_start) is bool
    assert [file.name for file in path.parent.iterdir()] == ["map.npz"]
    replace(made, kind="exact").save(path)
    assert VocabularyMap.load(path).kind == "exact"


def test_damaged_files_are_refused(saved: tuple[VocabularyMap, Path]) -> None:
    _, path = saved
    whole = path.read_bytes()
    with pytest.raises(UserError, match="nowhere.npz: cannot read the vocabulary map: No such file"):
        VocabularyMap.load(path.with_name("nowhere.npz"))
    for place in range(0, len(whole), 31):  # torn anywhere
        path.write_bytes(whole[:place])
        with pytest.raises(UserError, match="map.npz"):
            VocabularyMap.load(path)
    for place in range(0, len(whole), 11):  # a bit flipped anywhere: refused, or of no effect
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            assert VocabularyMap.load(path).content_hash == saved[0].content_hash
        except UserError as error:
            assert "map.npz" in str(error)
    np.save(path.with_name("array.npy"), np.arange(3))
    with pytest.raises(UserError, match="array.npy: not a vocabulary map"):
        VocabularyMap.load(path.with_name("array.npy"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "format 2, from before maps had cells; this version reads format 3; make it again with"),
        ({"format": 4}, "a vocabulary map of format 4; this version reads format 3"),
        ({"format": "3"}, "map.npz: not a vocabulary map"),
        ({"kind": "cells"}, "cell_T has 0 entries; expected: 35, one for each of the target's ids"),
        ({"kind": "exakt"}, "unknown name 'exakt' .did you mean 'exact'"),
        ({"target_size": 3}, "table_S is no table of ids below 3"),
        ({"source_marks_start": 1}, "damaged vocabulary map: source_marks_start is 1"),
        ({"source": None}, "damaged vocabulary map: source is None"),
        ({"source_size": 7}, "table_S has 33 entries, one for each of the source's 7 ids expected"),
        ({"target_eos": 40}, "damaged vocabulary map: target_eos is 40"),
        ({"source_marks_text": True}, "damaged vocabulary map: it was changed after it was made"),
    ],
)
def test_wrong_facts_are_refused(saved: tuple[VocabularyMap, Path], change: dict, words: str) -> None:
    _, path = saved
    with np.load(path) as file:
        arrays = dict(file)
    facts = json.loads(arrays["facts"].tobytes()) | change
    arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)
    with path.open("wb") as out:
        np.savez(out, **arrays)
    with pytest.raises(UserError, match=words):
        VocabularyMap.load(path)


@pytest.mark.parametrize(
    ("kind", "cell_T", "words"),
    [
        ("exact", [0, 1, 1, 3], "cell_T has 4 entries; expected: 0, none for kind exact"),
        ("cells", [0, 1, 1], "cell_T has 3 entries; expected: 4, one for each of the target's ids"),
        ("cells", [0, 1, 1, 4], "cell_T is no table of ids below 4"),
        ("cells", [0, 1, -1, 3], "cell_T is no table of ids below 4"),
        ("cells", [0, 0, 1, 3], "cell_T says that 1 stands for 2, but 0 for 1 itself"),
        ("cells", [0, 1, 1, 1], "cell_T does not fit unmarked_S, which has an id that stands for no cell"),
        ("cells", [0, 1, 1, 3], ""),
    ],
)
def test_tables_of_cells_that_cannot_be(kind: str, cell_T: list[int], words: str, tmp_path: Path) -> None:
    tables = [np.array(table, dtype=np.int32) for table in ([0, 1, -1], [0, 1, 1], [3, 1, 0])]
    made = VocabularyMap(kind, "a", "b", *tables, 3, 4, False, False, cell_T=np.array(cell_T, dtype=np.int32))
    made.save(tmp_path / "map")
    if words:
        with pytest.raises(UserError, match=words):
            VocabularyMap.load(tmp_path / "map")
    else:
        again = VocabularyMap.load(tmp_path / "map")
        assert again.cell_T.tolist() == cell_T
        assert again.content_hash == made.content_hash != replace(made, cell_T=np.arange(4)).content_hash


def test_a_map_of_an_older_format_is_replaced(saved: tuple[VocabularyMap, Path]) -> None:
    made, path = saved
    facts = np.frombuffer(json.dumps({"format": 2}).encode(), dtype=np.uint8)
    with path.open("wb") as out:
        np.savez(out, facts=facts)
    with pytest.raises(UserError, match=f"make it again with `fusemega align SOURCE TARGET {path}`"):
        VocabularyMap.load(path)
    made.save(path)
    assert VocabularyMap.load(path).content_hash == made.content_hash
    path.write_bytes(b"a text of somebody else")
    with pytest.raises(UserError, match="exists and is not a vocabulary map; it is not replaced"):
        made.save(path)
