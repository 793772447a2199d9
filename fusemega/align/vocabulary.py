"""The bytes that each token of a tokenizer stands for, by which two vocabularies are compared.

Vocabularies write the same bytes in different ways. Byte-level ones (GPT-2, Llama-3, Qwen) use one printable character
for each byte; SentencePiece ones (Llama-2, Mistral, Gemma) use U+2581 for a space and `<0xE2>` for rare bytes. These
forms are undone here, once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fusemega.errors import UserError
from fusemega.text.chat import ChatRenderer
from fusemega.text.document import BadRow, Chat, Message
from fusemega.text.tokenizer import Tokenizer

UNDERSCORE = "\u2581"  # SentencePiece's space
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_TEXT_DECODERS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "Sequence"}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's tokens, by id; `Vocabulary.of` makes one.

    Attributes:
        content_hash: the tokenizer's.
        source: its folder or hub id, for messages.
        forms: each token's form in the vocabulary; "" where an id is unused.
        contents: the bytes each token stands for in the middle of a text; None for special and control tokens and for
            unused ids.
        byte_tokens: ids of `<0xE2>`-like tokens, which a tokenizer uses only for bytes that no other token has.
        marker: how its forms write a space before a word: "▁", "Ġ", or "" if they write a space.
        bos_id, eos_id, unk_id: None where the tokenizer has none.
        closing_id: the one token with which the chat template closes an assistant's turn; None without a template, or
            if it does not close with exactly one token.
        marks_start: whether a message's first token carries a space that is not in the message: SentencePiece's dummy
            prefix ("Hello" -> "▁Hello"), or a space of the template's. Without a template: `marks_text`.
        marks_text: whether a plain text's first token carries such a space.
    """

    content_hash: str
    source: str
    forms: tuple[str, ...]
    contents: tuple[bytes | None, ...]
    byte_tokens: frozenset[int]
    marker: str
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    closing_id: int | None
    marks_start: bool
    marks_text: bool

    @property
    def size(self) -> int:
        """1 + the largest id."""
        return len(self.forms)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        """The vocabulary of a tokenizer with its chat template.

        Raises:
            UserError: tokens whose bytes cannot be told (WordPiece, for example), or an unusable chat template.
        """
        backend = tokenizer.hf.backend_tokenizer
        marker, to_bytes = _reader(backend.decoder, tokenizer.source)
        has_byte_tokens = marker != "Ġ" and "ByteFallback" in _decoders(backend.decoder)
        size = tokenizer.num_ids
        forms, contents = [""] * size, [None] * size  # type: tuple[list[str], list[bytes | None]]
        for form, i in backend.get_vocab(with_added_tokens=True).items():
            forms[i] = form
        # An added token is found in the text as it is written; one that the model's own vocabulary has as well
        # (Gemma's runs of spaces) is made from the text in the model's way, too, and stands for that.
        own = backend.get_vocab(with_added_tokens=False)
        added = backend.get_added_tokens_decoder()
        byte_tokens = set()
        for i, form in enumerate(forms):
            byte = _BYTE_TOKEN.fullmatch(form) if has_byte_tokens else None
            if byte:
                contents[i] = bytes([int(byte[1], 16)])
                byte_tokens.add(i)
            elif i in added and (added[i].special or form not in own):
                contents[i] = None if added[i].special else form.encode()
            elif form and i != tokenizer.hf.unk_token_id:
                contents[i] = to_bytes(form)
        (text,) = tokenizer.encode(["a"])
        marks_text = (contents[text.ids[0]] or b"").startswith(b" ")
        closing, marks_start = (None, marks_text) if tokenizer.chat_template is None else _in_chat(tokenizer, contents)
        return cls(
            content_hash=tokenizer.content_hash,
            source=tokenizer.source,
            forms=tuple(forms),
            contents=tuple(contents),
            byte_tokens=frozenset(byte_tokens),
            marker=marker,
            bos_id=tokenizer.hf.bos_token_id,
            eos_id=tokenizer.eos_id,
            unk_id=tokenizer.hf.unk_token_id,
            closing_id=closing,
            marks_start=marks_start,
            marks_text=marks_text,
        )


def _reader(decoder: Any, source: str) -> tuple[str, Callable[[str], bytes]]:
    """The word marker of a tokenizer's forms, and what turns a form into bytes."""
    decoders = _decoders(decoder)
    if "ByteLevel" in decoders:
        return "Ġ", _from_byte_level
    foreign = decoders.keys() - _TEXT_DECODERS
    if foreign:
        raise UserError(
            f"{source}: cannot tell what bytes its tokens stand for: its decoder is {', '.join(sorted(foreign))}; "
            "expected a byte-level or a SentencePiece-like tokenizer"
        )
    if "Metaspace" in decoders or decoders.get("Replace", {}).get("pattern") == {"String": UNDERSCORE}:
        return UNDERSCORE, lambda form: form.replace(UNDERSCORE, " ").encode()
    return "", str.encode


def _decoders(decoder: Any) -> dict[str, dict[str, Any]]:
    """A decoder and the parts of a sequence of them, by type (of several of one type, the first)."""
    found: dict[str, dict[str, Any]] = {}
    waiting = [] if decoder is None else [json.loads(decoder.__getstate__())]
    for node in waiting:
        found.setdefault(node["type"], node)
        waiting += node.get("decoders", [])
    return found


def _from_byte_level(form: str) -> bytes:
    table = _byte_level_table()
    try:
        return bytes(map(table.__getitem__, form))
    except KeyError:  # not in the byte-level alphabet: decoders do not change it
        return form.encode()


def byte_level_form(content: bytes) -> str:
    """Bytes as byte-level vocabularies write them.

    >>> byte_level_form(" é".encode())
    'ĠÃ©'
    """
    return "".join(map(_byte_level_characters().__getitem__, content))


@lru_cache
def _byte_level_characters() -> list[str]:
    table = _byte_level_table()
    return sorted(table, key=table.__getitem__)


@lru_cache
def _byte_level_table() -> dict[str, int]:
    """Character -> byte, as GPT-2's vocabulary writes bytes: printable Latin-1 characters stand for themselves, the
    others, in order, for U+0100 and following."""
    themselves = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(themselves))
    return {chr(b): b for b in themselves} | {chr(0x100 + n): b for n, b in enumerate(others)}


def _in_chat(tokenizer: Tokenizer, contents: list[bytes | None]) -> tuple[int | None, bool]:
    """The closing token, and whether a message's first token carries a space that is not in the message."""
    renderer = ChatRenderer(tokenizer)
    turns = (Message("user", "a", False), Message("assistant", "a", True))
    try:
        rendered = renderer.render(Chat(turns))
    except BadRow:  # some templates require a system message; the renderer has checked that one of the two works
        rendered = renderer.render(Chat((Message("system", "a", False), *turns)))
    # The space before Llama-2's " </s>" is the template's own: it has no place in the canonical stream.
    chat, closing = tokenizer.encode([rendered.text, renderer.closing.strip()])
    first = chat.ids[int((chat.ends > rendered.spans[-1].start).argmax())]
    return (int(closing.ids[0]) if len(closing.ids) == 1 else None), (contents[first] or b"").startswith(b" ")
