"""What tokens stand for: put together, they are the text again."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Encoder
from transformers import PreTrainedTokenizerFast

from fusemega.align.vocabulary import Vocabulary
from fusemega.errors import UserError
from fusemega.text.tokenizer import Tokenizer
from tests.text.toys import CORPUS, SPECIALS, TEMPLATES, byte_level, sentencepiece

TEXTS = [*CORPUS[:4], "hello world", " two  spaces ", "\n\ttab", "Ÿ ḿ 🤖 ▁", "12 345", ""]


def wordpiece() -> Tokenizer:
    encoder = Encoder(models.WordPiece({"a": 0, "##b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    encoder.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder.decoder = decoders.WordPiece()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=encoder, eos_token="[UNK]"), "bert")


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_the_contents_of_a_texts_tokens_are_the_text(make) -> None:
    tokenizer = make()
    vocabulary = Vocabulary.of(tokenizer)
    for text, encoding in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        prefix = b" " if make is sentencepiece and text else b""
        text = text.replace("▁", " ") if make is sentencepiece else text  # the tokenizer cannot tell them apart
        assert b"".join(vocabulary.contents[i] or b"?" for i in encoding.ids) == prefix + text.encode()


def test_the_real_smollm2(smollm2_folder: Path) -> None:
    tokenizer = Tokenizer.load(smollm2_folder)
    vocabulary = Vocabulary.of(tokenizer)
    for text, encoding in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        assert b"".join(vocabulary.contents[i] or b"?" for i in encoding.ids) == text.encode()
    assert (vocabulary.size, vocabulary.marker, vocabulary.marks_start) == (49152, "Ġ", False)
    assert vocabulary.forms[2] == "<|im_end|>" and vocabulary.closing_id == vocabulary.eos_id == 2
    assert vocabulary.contents[:3] == (None, None, None)
    assert len(set(vocabulary.contents)) == vocabulary.size - len(tokenizer.special_ids) + 1  # nothing stands twice


def test_roles_and_special_tokens() -> None:
    for make, marker in ((byte_level, "Ġ"), (sentencepiece, "▁")):
        vocabulary = Vocabulary.of(make("chatml"))
        form = vocabulary.forms
        assert (form[vocabulary.bos_id], form[vocabulary.eos_id]) == ("<s>", "</s>")
        assert form[vocabulary.closing_id] == "<|im_end|>" and vocabulary.marker == marker
        assert all(vocabulary.contents[form.index(special)] is None for special in SPECIALS)
    mistral = Vocabulary.of(byte_level("mistral"))
    assert mistral.closing_id == mistral.eos_id
    assert Vocabulary.of(byte_level("plain")).closing_id is None  # closes with a line break
    assert Vocabulary.of(sentencepiece("llama2")).closing_id == vocabulary.eos_id  # closes with " </s>"
    assert Vocabulary.of(byte_level(None)).closing_id is None


@pytest.mark.parametrize(
    ("make", "template", "marks"),
    [
        (byte_level, None, False),
        (byte_level, "chatml", False),
        (byte_level, "plain", True),  # "assistant: " + "a": the template's space is the token's
        (sentencepiece, None, True),
        (sentencepiece, "chatml", False),  # the message follows "assistant\n" in the same stretch
        (sentencepiece, "llama3", False),
        (sentencepiece, "mistral", False),
        (sentencepiece, "{{ bos_token }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}", True),
    ],
)
def test_whether_a_first_token_carries_a_space_of_its_own(make, template: str | None, marks: bool) -> None:
    assert Vocabulary.of(make(template)).marks_start is marks


def test_a_template_that_wants_a_system_message() -> None:
    wants = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATES["chatml"].jinja
    vocabulary = Vocabulary.of(byte_level(wants))
    assert vocabulary.forms[vocabulary.closing_id] == "<|im_end|>"


def test_byte_tokens_and_added_tokens() -> None:
    vocabulary = Vocabulary.of(sentencepiece())
    assert [vocabulary.contents[i] for i in sorted(vocabulary.byte_tokens)] == [bytes([b]) for b in range(256)]
    assert not Vocabulary.of(byte_level()).byte_tokens
    forms = {"a": 0, "▁▁": 1, "<0x0A>": 2}
    encoder = Encoder(models.BPE(forms, []))
    encoder.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    encoder.add_tokens([AddedToken("▁▁", normalized=False), AddedToken("▁é", normalized=False)])
    contents = Vocabulary.of(Tokenizer(PreTrainedTokenizerFast(tokenizer_object=encoder), "gemma")).contents
    # In the model's vocabulary and added; without byte fallback; added alone, so found in the text as it is.
    assert contents == (b"a", b"  ", b"<0x0A>", "▁é".encode())


def test_no_marker_and_unused_ids() -> None:
    encoder = Encoder(models.BPE({"a": 0, "▁": 3}, []))
    vocabulary = Vocabulary.of(Tokenizer(PreTrainedTokenizerFast(tokenizer_object=encoder), "characters"))
    assert (vocabulary.forms, vocabulary.marker) == (("a", "", "", "▁"), "")
    assert vocabulary.contents == (b"a", None, None, "▁".encode())


def test_bytes_that_cannot_be_told_are_refused() -> None:
    with pytest.raises(UserError, match="bert: cannot tell what bytes its tokens stand for: its decoder is WordPiece"):
        Vocabulary.of(wordpiece())
