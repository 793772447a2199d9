"""`fusemega align` from folders to a map's file and its page."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fusemega import cli
from fusemega.align.counts import count_pairs
from fusemega.align.dtw import decoded_strings
from fusemega.align.make_map import exact_map, ms_map, ms_reference_map
from fusemega.align.vocabulary import Vocabulary
from fusemega.align.vocabulary_map import VocabularyMap
from fusemega.fusion.evidence import evidence_of
from fusemega.fusion.teacher_store import TeacherStore, TeacherStoreConfig
from fusemega.report.align_page import EXAMPLE, shown, worked_example
from fusemega.store import Manifest, Row, StoreWriter
from fusemega.text.data import DataConfig
from fusemega.text.dataset import prepare
from fusemega.text.document import MASK_POLICY
from fusemega.text.sample import Sample
from fusemega.text.tokenizer import Tokenizer
from tests.align.map_loops import vocabulary
from tests.align.test_positions import kinds_by_loops
from tests.text.toys import CORPUS, byte_level, sentencepiece


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FUSEMEGA_CACHE", str(tmp_path / "cache"))
    sentencepiece().hf.save_pretrained("source")
    byte_level().hf.save_pretrained("target")
    Path("data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in CORPUS))
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    """What it says on stdout."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["align", "source", "target", *words])
    said = capsys.readouterr()
    assert stop.value.code == 0 and ("same tokenizer" in said.err) == ("same.npz" in words), said.err
    return json.loads(said.out)


def test_what_is_written_and_said(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "default.npz")["kind"] == "cells"
    told = run(capsys, "exact.npz", "--kind", "exact", "--data", "data.jsonl", "--report", "page")
    made = VocabularyMap.load("exact.npz")
    source, target = Vocabulary.of(sentencepiece()), Vocabulary.of(byte_level())
    assert (made.table_S == exact_map(source, target).table_S).all()
    usable = [u for u, content in enumerate(source.contents) if content is not None or made.table_S[u] >= 0]
    assert told["coverage"] == pytest.approx(np.mean(made.table_S[usable] >= 0), abs=1e-6)
    assert (told["source_ids"], told["target_ids"], told["kind"]) == (source.size, target.size, "exact")
    # Nothing predicts a text's first token.
    ids = [int(i) for e in sentencepiece().encode(CORPUS) for i in (*e.ids[1:], source.eos_id)]
    assert told["corpus_tokens"] == len(ids)
    assert told["corpus_coverage"] == pytest.approx(np.mean(made.table_S[ids] >= 0), abs=1e-6)
    assert sorted(path.name for path in Path("page").iterdir()) == [
        "coverage.png",
        "fusemega-files.json",
        "report.html",
    ]
    page = Path("page/report.html").read_text()
    assert EXAMPLE in page and "Tokens that keep no id" in page and "http" not in page.split("</style>")[1]
    lost = max((u for u in set(ids) if made.table_S[u] < 0), key=ids.count)
    section = page.split("Tokens that keep no id")[1].split("</table>")[0]
    assert shown(source, lost)[1:] in section and f"<td>{ids.count(lost):,}</td>" in section
    Path("data.jsonl").write_text(Path("data.jsonl").read_text() + "{\n")
    assert run(capsys, "exact.npz", "--data", "data.jsonl", "--on-bad-row", "skip")["corpus_tokens"] == len(ids)
    told = run(capsys, "mined.npz", "--kind", "mined", "--report", "page")  # an older page is replaced
    assert told["coverage"] > told["identical"] and Path("page/distances.png").is_file()
    mined = VocabularyMap.load("mined.npz")
    assert mined.kind == "mined"
    run(capsys, "ties.npz", "--kind", "mined", "--ties", "cooccurrence", "--data", "data.jsonl", "--on-bad-row", "skip")
    Path("more.jsonl").write_text(json.dumps({"text": CORPUS[0], "origin": "x"}) + "\n")
    assert run(capsys, "exact.npz", "--data", "more.jsonl", "--unknown-fields", "ignore")["corpus_tokens"] > 0
    changed = np.flatnonzero(VocabularyMap.load("ties.npz").table_S != mined.table_S)
    assert len(changed) and set(changed) <= set(ids)


def test_cells_and_their_page(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = run(capsys, "map.npz", "--report", "page")
    made, target = VocabularyMap.load("map.npz"), Vocabulary.of(byte_level())
    cells, sizes = np.unique(made.cell_T, return_counts=True)
    assert told["cells"] == len(cells) < target.size and told["coverage"] > told["identical"]
    section = Path("page/report.html").read_text().split("<h2>Cells</h2>")[1].split("<h2>")[0]
    largest = int(cells[sizes.argmax()])
    assert shown(target, largest)[1:] in section and f"<td>{sizes.max()}</td>" in section
    assert all(
        shown(target, i)[1:].replace("'", "&#39;") in section for i in np.flatnonzero(made.cell_T == largest)[:6]
    )
    # Ends of texts and turns are cells of their own.
    assert all((made.cell_T == i).sum() == 1 for i in (target.eos_id, target.closing_id))
    run(capsys, "map.npz", "--kind", "exact", "--report", "page")
    assert "<h2>Cells</h2>" not in Path("page/report.html").read_text()


def test_the_page_tells_whether_the_map_is_right(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "map.npz", "--kind", "exact", "--data", "data.jsonl")
    made, config = VocabularyMap.load("map.npz"), DataConfig(path="data.jsonl", seq_length=2048)
    theirs, ours = (prepare(config, tokenizer, "cache/data") for tokenizer in (sentencepiece(), byte_level()))
    counts: Counter[tuple[str, str]] = Counter()
    with StoreWriter("store", manifest_of(sentencepiece())) as writer:
        for a, b in zip(theirs, ours, strict=True):
            writer.add(a.key, flat_row(a))
            kinds, at = kinds_by_loops(a, b), {int(a.end_bytes[i]): int(i) for i in a.positions}
            for i, kind in kinds.items():
                if int(b.end_bytes[i]) > 0:  # but for the first position
                    said = int(made.table_S[a.ids[at[int(b.end_bytes[i])] + 1]])
                    counts[kind, "nothing" if said < 0 else "right" if said == b.ids[i + 1] else "another"] += 1
    run(capsys, "map.npz", "--kind", "exact", "--data", "data.jsonl", "--report", "page", "--store", "store")
    page = re.sub(r"\s*</?t[dr]>\s*", "|", Path("page/report.html").read_text())
    section = page[page.index("Is the map right?") : page.index("One to many")]
    total = sum(counts.values())
    for kind in {kind for kind, _ in counts}:
        here = [counts[kind, verdict] for verdict in ("right", "another", "nothing")]
        cells = [kind, f"{sum(here):,}", f"{sum(here) / total:.1%}", *(f"{count / sum(here):.1%}" for count in here)]
        assert "||".join(cells) in section, (kind, section)
    config = TeacherStoreConfig(store="store", map="map.npz")
    teacher = TeacherStore(config, "", byte_level(), made.target_size, 1.0, "residual", "label")
    for each in evidence_of(teacher, list(ours)):
        cells = [each.kind, f"{each.positions:,}", f"{each.share:.1%}", f"{each.label:.3f}", f"{each.unigram:.3f}"]
        assert "||".join(cells) in section, cells
    byte_level().hf.save_pretrained("source")
    for words, message in (
        (["--data", "data.jsonl", "--report", "page"], "store: the store's tokenizer is"),
        (["--report", "page"], "--store: its rows are looked at in a text, for the page; give --data too"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["align", "source", "target", "other.npz", "--store", "store", *words])
        assert message in capsys.readouterr().err and not Path("other.npz").exists()


def manifest_of(tokenizer: Tokenizer) -> Manifest:
    return Manifest(
        weights="w",
        tokenizer=tokenizer.content_hash,
        template=tokenizer.template_hash,
        mask_policy=MASK_POLICY,
        truncation=2048,
        temperature=1.0,
        top_k=1,
        vocab_size=tokenizer.num_ids,
    )


def flat_row(sample: Sample) -> Row:
    """Half of the probability for the token that follows."""
    half = np.full(len(sample.positions), np.log(0.5), dtype=np.float32)
    labels = sample.ids[sample.positions + 1]
    return Row(sample.ids_hash, sample.end_bytes[sample.positions], labels[:, None], half[:, None], half, -1.0, 1)


def test_kinds_that_count(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = {}
    for kind, positions in (("ms", None), ("ms_reference", None), ("ms_reference", "offsets"), ("ms", "dtw_reference")):
        words = ["--kind", kind, "--data", "data.jsonl", "--workers", "1", "--seq-length", "64"]
        words += [] if positions is None else ["--positions", positions]
        run(capsys, "map.npz", *words, "--report", "page")
        tables[kind, positions] = VocabularyMap.load("map.npz").table_S
    config = DataConfig(path="data.jsonl", seq_length=64)
    tokenizers = sentencepiece(), byte_level()
    source, target = (Vocabulary.of(tokenizer) for tokenizer in tokenizers)
    datasets = [prepare(config, tokenizer, "cache/data") for tokenizer in tokenizers]
    ends = count_pairs(*datasets, workers=1)
    path = count_pairs(*datasets, "dtw", tuple(map(decoded_strings, tokenizers, ("▁", "Ġ"))), 64, workers=1)
    assert (tables["ms", None] == ms_map(source, target, ends).table_S).all()
    assert (tables["ms", "dtw_reference"] == ms_map(source, target, path).table_S).all()
    assert (tables["ms_reference", None] == ms_reference_map(source, target, path).table_S).all()
    assert (tables["ms_reference", "offsets"] == ms_reference_map(source, target, ends).table_S).all()
    assert len({table_S.tobytes() for table_S in tables.values()}) == 4


def test_the_same_tokenizer_twice_is_the_identity(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    byte_level().hf.save_pretrained("source")
    assert run(capsys, "same.npz")["coverage"] == 1
    table_S = VocabularyMap.load("same.npz").table_S
    assert set(np.flatnonzero(table_S != np.arange(len(table_S)))) <= set(byte_level().special_ids.tolist())


def test_the_worked_example_pairs_what_ends_at_one_byte() -> None:
    tokenizers = sentencepiece(), byte_level(bos=True)
    vocabularies = [Vocabulary.of(tokenizer) for tokenizer in tokenizers]
    lines = worked_example(*tokenizers, *vocabularies)
    source_ids = tokenizers[0].encode([EXAMPLE])[0].ids.tolist()
    source_ends = np.cumsum([len(vocabularies[0].contents[i]) for i in source_ids]) - 1  # its first space is not there
    target_ids = [0, *tokenizers[1].encode([EXAMPLE])[0].ids.tolist()]
    taught = [(line[2], line[3]) for line in lines if line[3] != "none"]
    assert len(lines) == len(target_ids) and len(taught) > 10
    assert all(source_ends[position] == end for end, position in taught)
    assert {line[2] for line in lines if line[3] == "none"}.isdisjoint(source_ends.tolist())


def test_tokens_for_the_eye() -> None:
    tokens = vocabulary([b" a\n", b"\xe2\x82", "今\t".encode(), None, b"\x01<b>"])
    assert [shown(tokens, i) for i in range(5)] == ["\0␣a⏎", "\0‹E2›‹82›", "\0今⇥", "\0<3>", "\0\\u0001<b>"]
