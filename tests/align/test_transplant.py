"""A model on another vocabulary: every row against plain loops, all else bit for bit, and it computes what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fusemega import cli
from fusemega.align.make_map import exact_map
from fusemega.align.transplant import transplant
from fusemega.align.vocabulary import Vocabulary
from fusemega.align.vocabulary_map import VocabularyMap
from fusemega.convert.convert import import_hf
from fusemega.convert.verify import verify
from fusemega.errors import UserError
from fusemega.text.tokenizer import Tokenizer
from tests.checkpoint.conftest import save_llama
from tests.text import toys

BYTES, PIECES = toys.byte_level("llama3"), toys.sentencepiece("chatml")
BOS, EOS, TURN = 0, 1, 6  # of the byte-level toy; the SentencePiece one has them one later, and closes with another
IDS = {"bos_token_id": BOS, "eos_token_id": [EOS, TURN], "pad_token_id": None}


def _model(folder: Path, tokenizer: Tokenizer, **settings: Any) -> Path:
    """A random model with that tokenizer and three rows of padding."""
    save_llama(folder, vocab_size=tokenizer.num_ids + 3, max_shard_size="5GB", **settings)
    tokenizer.hf.save_pretrained(folder)
    generation = {"do_sample": True, **IDS, "suppress_tokens": [5], "begin_suppress_tokens": None}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def _bpe(form: str, tokenizer: Tokenizer) -> list[int]:
    """Byte-pair encoding in the plainest way; characters that are no token become byte tokens."""
    model = json.loads(tokenizer.hf.backend_tokenizer.to_str())["model"]
    ranks = {tuple(pair): rank for rank, pair in reversed(list(enumerate(model["merges"])))}
    parts = list(form)
    while pairs := [(ranks[pair], i) for i, pair in enumerate(zip(parts, parts[1:])) if pair in ranks]:  # noqa: B905
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    ids = []
    for part in parts:
        known = [part] if part in model["vocab"] else [f"<0x{byte:02X}>" for byte in part.encode()]
        ids += [model["vocab"][piece] for piece in known]
    return ids


def _alphabet() -> dict[int, str]:
    """Byte -> character of byte-level vocabularies, learnt from what a tokenizer library writes for each byte."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (ord(c) >= 256, ord(c)))
    plain = [ord(c) for c in letters if ord(c) < 256]
    rest = [byte for byte in range(256) if byte not in plain]
    return dict(zip(plain + rest, letters, strict=True))


def _characters(content: bytes) -> list[tuple[str, bytes]]:
    """Runs of whole characters, as text, and single bytes that belong to none."""
    found: list[tuple[str, bytes]] = []
    at = 0
    while at < len(content):
        for width in (1, 2, 3, 4):
            try:
                text = content[at : at + width].decode()
            except UnicodeDecodeError:
                continue
            before = found.pop()[0] if found and found[-1][0] else ""
            found.append((before + text, b""))
            break
        else:
            width = 1
            found.append(("", content[at : at + 1]))
        at += width
    return found


def _oracle(
    old_VH: torch.Tensor, old: Tokenizer, new: Tokenizer, roles: dict[int, int]
) -> tuple[torch.Tensor, list[str]]:
    """One row after another, as the rule is told; and which part of the rule gave it."""
    old_vocab, new_vocab = Vocabulary.of(old), Vocabulary.of(new)
    same: dict[bytes, int] = {}
    for i, content in enumerate(old_vocab.contents):
        if content is not None and (content not in same or same[content] in old_vocab.byte_tokens):
            same[content] = i
    everything = old_VH[: old.num_ids].double().mean(0)
    rows, rules = [], []
    for i, content in enumerate(new_vocab.contents):
        if i in roles:
            ids, rule = [roles[i]], "role"
        elif content is None or (i in new_vocab.byte_tokens and new_vocab.contents.count(content) > 1):
            ids, rule = [], "mean"
        elif content in same:
            ids, rule = [same[content]], "copied"
        elif old is BYTES:
            ids, rule = _bpe("".join(_alphabet()[byte] for byte in content), old), "averaged"
        else:
            ids, rule = [], "averaged"
            for text, byte in _characters(content):
                ids += _bpe(text.replace(" ", "▁"), old) if text else [same[byte]]
        rows.append(old_VH[ids].double().mean(0) if ids else everything)
        rules.append(rule)
    return torch.stack(rows), rules


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("direction", ["bytes to pieces", "pieces to bytes"])
def test_every_row_against_plain_loops(direction: str, tied: bool, tmp_path: Path) -> None:
    old, new = (BYTES, PIECES) if direction == "bytes to pieces" else (PIECES, BYTES)
    # bos, eos, and what closes a turn.
    roles = {1: 0, 2: 1, 4: 6} if old is BYTES else {0: 1, 1: 2, 6: 4}
    dtype = torch.bfloat16 if tied else torch.float32
    model = _model(tmp_path / "model", old, dtype=dtype, tie_word_embeddings=tied)
    new.hf.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "generation_config.json").write_text('{"max_length": 3}')
    record = transplant(model, tmp_path / "out", tmp_path / "tokenizer")
    before = AutoModelForCausalLM.from_pretrained(model).eval()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ours, theirs = after.state_dict(), before.state_dict()
    assert ours.keys() == theirs.keys()
    moved = {"model.embed_tokens.weight", "lm_head.weight"}
    for name in moved:
        expected, rules = _oracle(theirs[name], old, new, roles)
        assert ours[name].dtype == dtype and ours[name].shape == expected.shape
        for i, rule in enumerate(rules):
            if rule in ("role", "copied"):
                assert torch.equal(ours[name][i], expected[i].to(dtype)), f"id {i} is not copied bit for bit"
        # A float64 mean and an fp32 one may round apart by one unit of the last place.
        torch.testing.assert_close(
            ours[name].double(), expected.to(dtype).double(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6
        )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name not in moved)
    counts = {rule: rules.count(rule) for rule in set(rules)}
    assert record["copied"] == counts["role"] + counts["copied"] and record["averaged"] == counts["averaged"]
    assert record["mean"] == counts["mean"] and record["ids"] == new.num_ids
    assert min(counts.values()) >= 2, "every part of the rule is seen"
    # The same function as the old model with those rows: a plain dense one.
    with torch.no_grad():
        ids = torch.arange(7, new.num_ids, 11)[None]
        logits = after(ids).logits
        before.resize_token_embeddings(new.num_ids)
        before.load_state_dict(ours)
        assert torch.equal(before(ids).logits, logits) and logits.shape[-1] == new.num_ids
    import_hf(tmp_path / "out", tmp_path / "megatron")
    assert verify(tmp_path / "out", tmp_path / "megatron").identical
    _check_files(tmp_path / "out", new, tied)


def _check_files(out: Path, new: Tokenizer, tied: bool) -> None:
    carried = Tokenizer.load(out)
    assert (carried.content_hash, carried.template_hash) == (new.content_hash, new.template_hash)
    config = json.loads((out / "config.json").read_text())
    vocabulary = Vocabulary.of(new)
    assert config["vocab_size"] == new.num_ids and config["tie_word_embeddings"] == tied
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (
        vocabulary.bos_id,
        new.eos_id,
        None,
    )
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {
        "do_sample": True,
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": [vocabulary.eos_id, vocabulary.closing_id],
        "pad_token_id": None,
    }
    assert json.loads((out / "transplant.json").read_text())["dropped_settings"] == ["suppress_tokens"]


def test_a_map_of_its_own(tmp_path: Path) -> None:
    model = _model(tmp_path / "model", BYTES)
    PIECES.hf.save_pretrained(tmp_path / "tokenizer")
    new, old = Vocabulary.of(PIECES), Vocabulary.of(BYTES)
    exact = exact_map(new, old)
    table_S = exact.table_S.copy()
    (changed,) = np.flatnonzero(table_S < 0)[-1:]
    assert changed not in new.byte_tokens
    table_S[changed] = 77
    settings = {name: getattr(exact, name) for name in VocabularyMap.__dataclass_fields__}
    VocabularyMap(**{**settings, "table_S": table_S}).save(tmp_path / "map")
    transplant(model, tmp_path / "out", tmp_path / "tokenizer", tmp_path / "map")
    rows = [AutoModelForCausalLM.from_pretrained(f).model.embed_tokens.weight for f in (tmp_path / "out", model)]
    assert torch.equal(rows[0][changed], rows[1][77])
    exact_map(old, new).save(tmp_path / "turned")
    with pytest.raises(
        UserError, match="turned: maps in the other direction; a transplant needs a map whose source is"
    ):
        transplant(model, tmp_path / "new", tmp_path / "tokenizer", tmp_path / "turned")
    exact_map(old, old).save(tmp_path / "other")
    with pytest.raises(UserError, match="other: maps other vocabularies"):
        transplant(model, tmp_path / "new", tmp_path / "tokenizer", tmp_path / "other")


def test_a_token_that_the_model_has_no_row_for(tmp_path: Path) -> None:
    """An id beyond the model's vocabulary is neither copied nor a piece."""
    save_llama(tmp_path / "model", vocab_size=BYTES.num_ids - 60, max_shard_size="5GB")
    BYTES.hf.save_pretrained(tmp_path / "model")
    PIECES.hf.save_pretrained(tmp_path / "tokenizer")
    record = transplant(tmp_path / "model", tmp_path / "out", tmp_path / "tokenizer")
    whole = transplant(_model(tmp_path / "whole", BYTES), tmp_path / "other", tmp_path / "tokenizer")
    assert 0 < record["copied"] < whole["copied"]
    assert not (tmp_path / "out" / "suppress_tokens").exists() and record["dropped_settings"] == []


def test_the_command_and_what_it_leaves_when_it_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = _model(tmp_path / "model", BYTES), tmp_path / "there" / "out"
    PIECES.hf.save_pretrained(tmp_path / "tokenizer")
    words = ["transplant", str(model), str(out), "--tokenizer", str(tmp_path / "tokenizer")]
    with monkeypatch.context() as patch:
        patch.setattr("fusemega.align.transplant.write_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            cli.main(words)
    assert not out.parent.exists(), "half a folder was left"
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    said = capsys.readouterr()
    assert not stop.value.code and json.loads(said.out)["wrote"] == str(out)
    assert "averaged over pieces" in said.err and "ids of the old vocabulary: suppress_tokens" in said.err
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["config.json", "generation_config.json", "integrity.json", "model.safetensors", "transplant.json"]
        + ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    )
    before = sorted(out.iterdir())
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert (
        stop.value.code == 2 and "nothing is overwritten" in capsys.readouterr().err and sorted(out.iterdir()) == before
    )
