"""What a teacher that is sure of its next token teaches, with real tokenizers.

Where both tokenizers write the same next bytes of the text, the target must be taught its very own next token, at a
content's first position above all.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fusemega.align.make_map import exact_map, first_piece_map
from fusemega.align.pieces import before_text
from fusemega.align.vocabulary import byte_level_form
from fusemega.align.vocabulary_map import VocabularyMap
from fusemega.errors import UserError
from fusemega.files.tokenizer_files import load_pretrained
from fusemega.fixtures.packages import AssetMissing
from fusemega.fixtures.tokenizers import tokenizer
from fusemega.fusion.teacher_store import TeacherStore, TeacherStoreConfig
from fusemega.store import Manifest, Row, StoreWriter
from fusemega.text.chat import ChatRenderer, render_text
from fusemega.text.document import MASK_POLICY, Text, canonical, parse
from fusemega.text.sample import Sample, annotate, cut
from fusemega.text.tokenizer import Tokenizer
from tests.align.map_loops import vocabulary
from tests.align.real import chat, real_tokenizers

MORE_ROWS = 271  # than the tokenizer has ids, as Qwen2.5
ROWS = {
    "chat": chat("Count to three", "One, two, three.", "And in Chinese?", "一二三"),
    "text": {"text": "Hello world, this is a text. 你好"},
    "chinese": {"text": "你好 world"},
    "completion": {"prompt": "Count to three:", "completion": " one two three"},
    "sentence": {"prompt": "Say hello. ", "completion": "Hello there, you"},
    "space": {"text": " Leading space"},
}


def samples(tokenizer: Tokenizer, row: dict, seq_length: int = 512) -> list[Sample]:
    document = parse(row)
    rendered = render_text(document) if isinstance(document, Text) else ChatRenderer(tokenizer).render(document)
    annotated = annotate(rendered, tokenizer.encode([rendered.text])[0], tokenizer)
    return list(cut(annotated, canonical(document), seq_length, "data:1"))


def sure_row(sample: Sample) -> Row:
    """All of the probability on the text's own next token."""
    count = len(sample.positions)
    ids_P1 = sample.ids[sample.positions + 1][:, None].astype(np.int32)
    nothing_P = np.full(count, -np.inf, dtype=np.float32)
    ends_P = sample.end_bytes[sample.positions]
    return Row(sample.ids_hash, ends_P, ids_P1, np.zeros((count, 1), np.float32), nothing_P, -1.0, 1)


def teacher(folder: Path, source: Tokenizer, target: Tokenizer, made: VocabularyMap) -> TeacherStore:
    manifest = Manifest(
        weights="w",
        tokenizer=source.content_hash,
        template=source.template_hash,
        mask_policy=MASK_POLICY,
        truncation=512,
        temperature=1.0,
        top_k=1,
        vocab_size=source.num_ids + MORE_ROWS,
    )
    with StoreWriter(folder / "store", manifest):
        pass
    made.save(folder / "map")
    config = TeacherStoreConfig(store=str(folder / "store"), map=str(folder / "map"))
    return TeacherStore(config, "objective", target, target.num_ids, 1.0, "residual")


def without_bos(tokenizer: Tokenizer) -> Tokenizer:
    """The same vocabulary, which puts nothing before a text."""
    other = copy(tokenizer)
    other.prefix_ids = ()
    return other


NAMES = ("mistral_v3", "smollm2", "llama2")  # as in tests/align/test_real_maps.py: loaded once
PAIRS = [("mistral_v3", "smollm2"), ("smollm2", "mistral_v3"), ("llama2", "smollm2")]


@pytest.mark.parametrize(("source_name", "target_name"), PAIRS)
def test_equal_next_bytes_teach_the_label(source_name: str, target_name: str, tmp_path: Path) -> None:
    (source, own), (target, other) = (real_tokenizers(*NAMES)[name] for name in (source_name, target_name))
    taught = teacher(tmp_path, source, target, exact_map(own, other))
    for kind, row in ROWS.items():
        compared = 0
        for plain in (source, without_bos(source)) if kind != "chat" else (source,):
            (theirs,) = samples(plain, row)
            scored = sure_row(theirs)
            ends = np.append(theirs.end_bytes, -1)
            after = {int(ends[p]): int(ends[p + 1]) for p in theirs.positions if ends[p] >= 0}
            # Small windows of the target's: the first position of a later one is no beginning of anything.
            for sample in [*samples(target, row), *samples(target, row, 5)]:
                targets = taught.targets(scored, sample)
                last = {int(sample.end_bytes[p]): int(p) for p in sample.positions if sample.end_bytes[p] >= 0}
                for end, position in last.items():
                    if end in after and after[end] == sample.end_bytes[position + 1]:
                        p = int(np.searchsorted(sample.positions, position))
                        label = int(sample.ids[position + 1])
                        assert targets.ids_PK[p, 0] == label, (kind, end, target.token(label))
                        compared += 1
        assert compared >= 4, kind


def test_where_a_text_ends_eos_becomes_eos_and_a_turns_end_the_end_of_a_turn(tmp_path: Path) -> None:
    """SmolLM2's eos closes turns; the target's is another token than the one that closes its turns."""
    source, own = real_tokenizers(*NAMES)["smollm2"]
    hf = load_pretrained(source.source)
    hf.eos_token = "<|endoftext|>"
    target = Tokenizer(hf, "base")
    im_end, end_of_text = (hf.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>"))
    assert (source.eos_id, target.eos_id) == (im_end, end_of_text)
    to = replace(own, content_hash=target.content_hash, eos_id=end_of_text)
    taught = teacher(tmp_path, source, target, exact_map(own, to))
    for row, last in ((ROWS["text"], end_of_text), (ROWS["completion"], end_of_text), (ROWS["chat"], im_end)):
        (theirs,), (ours,) = samples(source, row), samples(target, row)
        assert taught.targets(sure_row(theirs), ours).ids_PK[-1, 0] == last == ours.ids[ours.positions[-1] + 1]


def test_first_pieces_are_what_the_target_writes_before_text() -> None:
    """SmolLM2 has tokens for "  \\n" and "\\n\\n", and writes them in two before a word; Qwen2.5 does not."""
    try:
        qwen = Tokenizer.load(tokenizer("qwen2.5"))
    except AssetMissing as error:
        pytest.skip(str(error))
    smollm2, target = real_tokenizers(*NAMES)["smollm2"]
    ids = {content: i for i, content in enumerate(target.contents)}
    expected = {b"  \n": b"  ", b"\n\n": b"\n", b"\n": b"\n", b"  ": b"  ", b" the": b" the"}
    assert expected.keys() <= ids.keys()
    contents: list[bytes | None] = [None] * qwen.num_ids
    for content in expected:
        contents[qwen.hf.convert_tokens_to_ids(byte_level_form(content))] = content
    made = first_piece_map(vocabulary(contents), target, lambda content: [], before_text(qwen, smollm2, contents))
    for u, content in enumerate(contents):
        assert content is None or made.table_S[u] == ids[expected[content]], content
    (cut_here,) = smollm2.encode(["a  \na"])
    assert [target.contents[i] for i in cut_here.ids] == [b"a", b"  ", b"\n", b"a"]


def test_maps_of_other_sizes_are_refused(tmp_path: Path) -> None:
    loaded = real_tokenizers(*NAMES)
    (source, theirs), (target, ours) = loaded["mistral_v3"], loaded["smollm2"]
    made = exact_map(theirs, ours)
    for name, changed, words in (
        ("short", replace(made, table_S=made.table_S[:-9]), "table_S has 32759 entries, one for each of the source's"),
        ("long", replace(made, target_size=ours.size + 1), "the map has 49153 ids of the target, and the tokenizer of"),
    ):
        (tmp_path / name).mkdir()
        with pytest.raises(UserError, match=words):
            teacher(tmp_path / name, source, target, changed)
    config = TeacherStoreConfig(store=str(tmp_path / "long/store"), map=str(tmp_path / "right"))
    made.save(tmp_path / "right")
    with pytest.raises(UserError, match="the map contains id 4915., and the model in training has a vocabulary of 900"):
        TeacherStore(config, "objective", target, 900, 1.0, "residual")
