"""A sample without a row in a store: the message says which of the three reasons it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fusemega.errors import UserError
from fusemega.fusion.teacher_store import TeacherStore, TeacherStoreConfig
from fusemega.store import Manifest, Row, StoreWriter
from fusemega.text.data import DataConfig
from fusemega.text.dataset import TokenizedDataset, prepare
from fusemega.text.document import MASK_POLICY
from tests.text.toys import byte_level

TOKENIZER = byte_level("chatml")
TURNS = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "the quick brown fox jumps over the lazy dog"},
    {"role": "user", "content": "and"},
    {"role": "assistant", "content": "the fox"},
]
CHAT = {"messages": TURNS}
TEXT = {"text": "the lazy dog jumps over the quick brown fox"}


def data(folder: Path, rows: list[dict], seq_length: int) -> TokenizedDataset:
    folder.mkdir()
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(path=str(folder / "data.jsonl"), seq_length=seq_length)
    return prepare(config, TOKENIZER, folder / "cache")


@pytest.mark.parametrize(
    ("stored", "windows", "words"),
    [
        ([CHAT], 16, "it has the text in other windows, such as its bytes 0 to .*: its scorer's are 16 tokens"),
        ([{"prompt": TURNS[:3], "completion": TURNS[3:]}], 256, "it has the text with other parts of it supervised"),
        ([{"text": "the fox"}], 256, "it has none of these 2 samples: it was written from other data"),
        ([TEXT], 256, "it has 1 of these 2 samples, and not this text"),
    ],
)
def test_why(stored: list[dict], windows: int, words: str, tmp_path: Path) -> None:
    manifest = Manifest(
        weights="w",
        tokenizer=TOKENIZER.content_hash,
        template=TOKENIZER.template_hash,
        mask_policy=MASK_POLICY,
        truncation=windows,
        temperature=1.0,
        top_k=1,
        vocab_size=TOKENIZER.num_ids,
    )
    with StoreWriter(tmp_path / "store", manifest) as writer:
        for sample in data(tmp_path / "theirs", stored, windows):
            count = len(sample.positions)
            ids_P1, nothing_P = np.zeros((count, 1), np.int32), np.full(count, -np.inf, np.float32)
            ends_P = sample.end_bytes[sample.positions]
            zero_P1 = np.zeros((count, 1), np.float32)
            writer.add(sample.key, Row(sample.ids_hash, ends_P, ids_P1, zero_P1, nothing_P, -1.0, 1))
    config = TeacherStoreConfig(store=str(tmp_path / "store"))
    taught = TeacherStore(config, "objective", TOKENIZER, TOKENIZER.num_ids, 1.0, "residual")
    with pytest.raises(UserError, match=f"data.jsonl:1: no row in the store .*allowed with on_missing: skip.: {words}"):
        taught.check_data(data(tmp_path / "ours", [CHAT, TEXT], 256), required=True)
