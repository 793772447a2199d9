"""Vocabularies compared by evidence; whose tokenizer, template and eos a merge carries."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from fusemega.text.vocabulary_files import difference, read_vocabulary
from tests.merge.conftest import entries, read_all, run_merge
from tests.merge.test_folders import _refused

Family = Callable[..., tuple[Path, list[Path]]]
MERGES = [("t", "h"), ("th", "e"), ("a", "n"), ("an", "d")]
ENDS = ("<|end|>", "<|user|>", "<|im_end|>")
CHATML = "{% for m in messages %}<|user|>{{ m.content }}<|im_end|>{% endfor %}"


def _bpe(folder: Path, merges: Any = MERGES, added: Any = ENDS, template: str | None = None, eos: int = 298) -> Path:
    """A byte-level BPE tokenizer of 301 ids at most, the added ones the last; `eos` in all three places."""
    characters = pre_tokenizers.ByteLevel.alphabet()
    tokens = [*sorted(characters), *("".join(pair) for pair in merges)]
    tokens += [f"x{i}" for i in range(298 - len(tokens))]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": [list(p) for p in merges]}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    extra = [plain | {"id": 298 + i, "content": token} for i, token in enumerate(added)]
    whole = {"version": "1.0", "added_tokens": extra, "model": model, "pre_tokenizer": level, "decoder": level}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {"eos_token": added[eos - 298]} if added else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return folder


@pytest.fixture
def bare(family: Family) -> tuple[Path, list[Path]]:
    """A base without a template that stops at 298, and two models with one that stop at 300."""
    base, models = family(rms=(1e-3, 1e-3), num_hidden_layers=1)
    return _bpe(base), [_bpe(model, template=CHATML, eos=300) for model in models]


def _of(base: Path, models: list[Path], **more: Any) -> dict[str, Any]:
    return {"merge_method": "ties", "base_model": str(base), "models": entries(models, weight=[0.5, 0.5])} | more


@pytest.mark.parametrize("said", [None, "auto", "a model", "literal"])
def test_a_merge_carries_the_models_template_and_where_they_stop(said: str | None, bare: Any, tmp_path: Path) -> None:
    base, models = bare
    asked = {"a model": str(models[1]), "literal": CHATML + "{# mine #}"}.get(said or "", said)
    out = run_merge(tmp_path / "out", **_of(base, models, **({"chat_template": asked} if said else {})))
    made = AutoTokenizer.from_pretrained(out)
    assert made.chat_template == (asked if said == "literal" else CHATML)
    stops = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert stops == ([298, 300] if said == "literal" else 300)
    assert said == "literal" or made.eos_token == "<|im_end|>"


def test_templates_that_differ_are_told(bare: Any, tmp_path: Path) -> None:
    base, models = bare
    _bpe(models[1], template=CHATML + "{# other #}", eos=300)
    out = run_merge(tmp_path / "out", **_of(base, models))
    assert AutoTokenizer.from_pretrained(out).chat_template is None
    notes = json.loads((out / "merge_report.json").read_text())["notes"]
    assert any("2 different ones among the models; say whose with chat_template: MODEL" in note for note in notes)
    assert "allowed: auto, one of" in _refused(tmp_path / "b", **_of(base, models, chat_template="chatml"))


def test_rows_by_position_with_a_models_tokenizer(bare: Any, tmp_path: Path) -> None:
    base, models = bare
    for model in models:
        _bpe(model, added=("<|stop|>", "<|you|>", "<|me|>"), eos=300)
    assert "id 298 is '<|end|>'" in _refused(tmp_path, **_of(base, models))
    outs = [
        run_merge(tmp_path / "a", **_of(base, models, tokenizer_source=str(models[0]))),
        run_merge(tmp_path / "b", **_of(base, models, vocabulary="position", tokenizer_source=str(models[0]))),
    ]
    for out in outs:
        assert AutoTokenizer.from_pretrained(out).convert_ids_to_tokens([298, 299, 300]) == [
            "<|stop|>",
            "<|you|>",
            "<|me|>",
        ]
        assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 300
    first, second = (read_all(out) for out in outs)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    _bpe(models[1], added=("<|stop|>", "<|me|>", "<|you|>"), eos=300)  # not one vocabulary among the models
    assert "choose vocabulary" in _refused(tmp_path, **_of(base, models, tokenizer_source=str(models[0])))


def _split(folder: Path, merges: Any = MERGES) -> None:
    """tokenizer.json as vocab.json + merges.txt + added_tokens.json."""
    whole = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    (folder / "added_tokens.json").write_text(json.dumps({t["content"]: t["id"] for t in whole["added_tokens"]}))


def test_vocabularies_are_compared_by_what_files_there_are(bare: Any) -> None:
    base, models = bare
    same = difference(*_read(base, models[0]))
    assert same is None
    _split(models[0])
    assert difference(*_read(base, models[0])) is None
    _split(_bpe(models[0]), MERGES[2:] + MERGES[:2])
    found = difference(*_read(base, models[0]))
    assert found is not None and "the merges are not the same" in found
    words = json.loads((models[0] / "vocab.json").read_text())
    (models[0] / "vocab.json").write_text(json.dumps(words | {"the": words["and"], "and": words["the"]}))
    found = difference(*_read(base, models[0]))
    assert found is not None and found.startswith(f"id {words['the']} is 'the' in {base} and 'and' in")


def _read(*folders: Path) -> list[Any]:
    return [read_vocabulary(folder) for folder in folders]


def test_sentencepiece_models_are_read(tmp_path: Path) -> None:
    def piece(token: str, score: float) -> bytes:
        inner = b"\x0a" + bytes([len(token.encode())]) + token.encode() + b"\x15" + struct.pack("<f", score)
        return b"\x0a" + bytes([len(inner)]) + inner

    for name, tokens in (("a", ["<s>", "\u2581a", "b"]), ("b", ["<s>", "b", "\u2581a"])):
        (tmp_path / name).mkdir()
        content = b"".join(piece(token, -float(i)) for i, token in enumerate(tokens)) + b"\x12\x02\x08\x01"
        (tmp_path / name / "tokenizer.model").write_bytes(content)
    first, second = _read(tmp_path / "a", tmp_path / "b")
    assert first.strings == {0: "<s>", 1: "\u2581a", 2: "b"} and difference(first, first) is None
    assert str(difference(first, second)).startswith("id 1 is '\u2581a'")


def test_no_evidence_is_no_equality(bare: Any, tmp_path: Path) -> None:
    base, models = bare
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (models[1] / file).unlink()
    message = _refused(tmp_path, **_of(base, models))
    assert message.startswith(f"{models[1]}: no tokenizer's files there") and message.endswith("vocabulary: position")
    run_merge(tmp_path / "out", **_of(base, models, vocabulary="position"))


def test_union_keeps_the_bases_cutting(bare: Any, tmp_path: Path) -> None:
    base, models = bare
    _bpe(models[0], [*MERGES, ("o", "n")])
    assert "would cut its text otherwise" in _refused(tmp_path, **_of(base, models, vocabulary="union"))
    _bpe(models[0], added=("<|end|>", "<|user|>", "<|new|>"), template=CHATML.replace("im_end", "new"), eos=300)
    out = run_merge(tmp_path / "out", **_of(base, models, vocabulary="union", chat_template=str(models[1])))
    made, before = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(base)
    text = "the river and the boat<|im_end|>"
    assert made(text)["input_ids"] == before(text)["input_ids"] and made.convert_tokens_to_ids("<|new|>") == 301
