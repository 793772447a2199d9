"""Loading, hashes, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fusemega.text.tokenizer as tokenizer_module
from fusemega.errors import UserError
from fusemega.text.tokenizer import Tokenizer
from tests.text.toys import CORPUS, byte_level, sentencepiece


def test_hashes_survive_saving_and_tell_tokenizers_apart(tmp_path: Path) -> None:
    first = byte_level("chatml")
    first.hf.save_pretrained(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (again.content_hash, again.template_hash) == (first.content_hash, first.template_hash)
    assert byte_level("llama3").content_hash == first.content_hash
    assert byte_level("llama3").template_hash != first.template_hash
    assert sentencepiece("chatml").content_hash != first.content_hash
    again.hf.add_tokens(["<new>"])
    assert Tokenizer(again.hf, "grown").content_hash != first.content_hash
    again.hf.eos_token = "<|im_end|>"
    assert Tokenizer(again.hf, "other eos").content_hash != first.content_hash


def test_encoding_is_the_tokenizers_own_and_covers_the_text() -> None:
    tokenizer = byte_level(None)
    for text, got in zip(CORPUS[:4], tokenizer.encode(CORPUS[:4]), strict=True):
        assert got.ids.tolist() == tokenizer.hf(text, add_special_tokens=False)["input_ids"]
        assert got.ids.dtype == np.int32
        assert got.starts[0] == 0 and got.ends[-1] == len(text)
        assert (got.starts[1:] <= got.ends[:-1]).all()  # no gap: spaces belong to a token


def test_prefix_and_ids() -> None:
    assert byte_level(None).prefix_ids == ()
    tokenizer = byte_level(None, bos=True)
    assert [tokenizer.token(i) for i in tokenizer.prefix_ids] == ["<s>"]
    assert tokenizer.num_ids == len(tokenizer.hf)
    assert tokenizer.pad_id == tokenizer.eos_id


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot load a tokenizer"):
        Tokenizer.load(tmp_path)

    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="slow tokenizer"):
        Tokenizer(Slow(), "old")


def test_texts_are_tokenized_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["hello world", "", "x" * 30, "the quick brown fox", "é", "a", "b" * 20, "c"]
    whole = byte_level().encode(texts)
    monkeypatch.setattr(tokenizer_module, "_TOGETHER", 20)
    assert list(tokenizer_module._portions(texts)) == [
        texts[:2],
        texts[2:3],
        texts[3:5],
        texts[5:6],
        texts[6:7],
        texts[7:],
    ]
    for portions, at_once in zip(byte_level().encode(texts), whole, strict=True):
        assert portions.ids.tolist() == at_once.ids.tolist() and portions.ends.tolist() == at_once.ends.tolist()
    assert byte_level().encode([]) == []
