"""A finished folder loads as what was trained, and stops where turns end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from fusemega.errors import UserError
from fusemega.hf.loadable import settle, stop_ids
from fusemega.text.tokenizer import Tokenizer
from tests.merge.conftest import CONFIG
from tests.text.toys import byte_level


@pytest.fixture(scope="module")
def reference() -> Tokenizer:
    return byte_level("chatml")


def _folder(folder: Path, reference: Tokenizer, generation: dict[str, Any] | None, **config: Any) -> Path:
    folder.mkdir()
    reference.hf.save_pretrained(folder)
    settings = CONFIG | {"vocab_size": reference.num_ids, "eos_token_id": 0} | config
    (folder / "config.json").write_text(json.dumps(settings))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.mark.parametrize("generation", [{"eos_token_id": 0, "temperature": 0.7, "do_sample": True}, {}, None])
def test_generation_stops_where_turns_end(generation: Any, reference: Tokenizer, tmp_path: Path) -> None:
    folder = _folder(tmp_path / "out", reference, generation)
    closing = reference.encode(["<|im_end|>"])[0].ids.tolist()
    notes = settle(folder, reference, chats=True)
    assert len(notes) == 1 and "<|im_end|>" in notes[0] and "\n" not in notes[0]
    assert GenerationConfig.from_pretrained(folder).eos_token_id == stop_ids(folder) == [0, *closing]
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == [0, *closing]
    for key, value in (generation or {}).items():
        assert key == "eos_token_id" or json.loads((folder / "generation_config.json").read_text())[key] == value
    assert settle(folder, reference, chats=True) == []


def test_nothing_is_changed_that_was_not_taught(reference: Tokenizer, tmp_path: Path) -> None:
    folder = _folder(tmp_path / "out", reference, {"eos_token_id": 0})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert settle(folder, reference, chats=False) == []
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_another_tokenizer_than_the_rows_is_put_right(reference: Tokenizer, tmp_path: Path) -> None:
    folder = _folder(tmp_path / "out", reference, {"eos_token_id": 0})
    damaged = json.loads((folder / "tokenizer.json").read_text())
    damaged["model"]["merges"] = damaged["model"]["merges"][::-1]
    (folder / "tokenizer.json").write_text(json.dumps(damaged))
    text = "The river was cold, and the boat was late in the morning."
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] != reference.hf(text)["input_ids"]
    (note,) = settle(folder, reference, chats=False)
    assert "PreTrainedTokenizerFast" in note
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == reference.hf(text)["input_ids"]


def test_a_closing_token_without_a_row_is_refused(reference: Tokenizer, tmp_path: Path) -> None:
    closing = int(reference.encode(["<|im_end|>"])[0].ids[0])
    folder = _folder(tmp_path / "out", reference, {"eos_token_id": 0}, vocab_size=closing)
    with pytest.raises(UserError, match="can neither read nor write what ends a turn"):
        settle(folder, reference, chats=True)
    assert any("rows: none for" in note for note in settle(folder, reference, chats=False))


def test_the_template_of_the_run_file_is_the_folders(reference: Tokenizer, tmp_path: Path) -> None:
    folder = _folder(tmp_path / "out", reference, None)
    (tmp_path / "t.jinja").write_text((reference.chat_template or "") + "{# trained #}")
    notes = settle(folder, reference.with_template(tmp_path / "t.jinja"), chats=True)
    assert any("t.jinja, with which it was trained" in note for note in notes)
    assert Tokenizer.load(folder).chat_template == (tmp_path / "t.jinja").read_text()
